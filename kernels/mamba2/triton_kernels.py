"""Kernels of Mamba-2, forward and backward: many heads that share C and B, a scalar decay and a
step a token and head.

The names are attention's: q is C, k is B, v is x, and D_ts = exp(G_t - G_s) Δ_s for tokens s <= t:

    forward in time     o_t  = Σ D_ts (q_t·k_s) v_s        dq_t = Σ D_ts (do_t·v_s) k_s
    backward in time    dv_s = Σ D_ts (k_s·q_t) do_t       dk_s = Σ D_ts (v_s·do_t) q_t

`prepare_kernel` writes down every token's decays. `walk_kernel` walks the chunks of a segment with
the state Σ y zᵀ of several heads in registers, side by side: first for what the segment adds to the
state, then, once it is known what enters the segment, to write the state at the border of every
chunk. Then chunks stand alone: the other kernels go from head to head, so that the scores q·k are
made once, and what dq and dk get of all heads adds up in registers.

Notation: B batch, T tokens, H heads, K (Mamba-2's N) and V (its P) head sizes; X, Z the sizes of y
and of z; C tokens a chunk; N chunks, L = N·C tokens; S segments. v, o and their gradients are
[B, T, H, V], q and k [B, T, Q, K] with Q groups of H / Q heads; their last axis is contiguous.
States of segments are [B, S, H, K, V] fp32, those of chunks [B, N, H, K, V] in fp16 with a power of
two a state, `scales` [B, H, N] (fp32 without one for fp32 inputs): the decay's gradient is a sum of
many terms of either sign, in which bf16's rounding of states would add up. What they are
multiplied by is bf16 turned into fp16, exact with a power of two a row.
Numbers of tokens are [B, H, L]: `sums`, G in log2 inside chunks; `steps`, Δ; `from_start`, the
decay from the chunk's start to each token; `to_end`, from each token to the chunk's end; zeros
beyond the sequence. `chunk_log` [B, H, N] is a chunk's log2 decay. A slice is a block of V of one
head.
`b_*` blocks in registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.segments import LOG2_E
from fla_dist.kernels.simple_gla.triton_kernels import load_rows


@triton.jit
def split_dot(b_a, b_b, b_sum, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum + b_a @ b_b for an fp32 b_b, rounded to b_a's type, or with SPLIT as the sum of two
    numbers of that type.

    The decay's gradient is made of sums whose large parts cancel; with SPLIT all of them come from
    the same states."""
    b_high = b_b.to(b_a.dtype)
    b_sum = tl.dot(b_a, b_high, b_sum, input_precision=PRECISION)
    if SPLIT:
        b_low = (b_b - b_high.to(tl.float32)).to(b_a.dtype)
        b_sum = tl.dot(b_a, b_low, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def power_of_two(b_x):
    """The power of two at or below each number of at least 2^-100, and its inverse."""
    b_bits = tl.maximum(b_x, 7.8886090522101181e-31).to(tl.int32, bitcast=True) & 0x7F800000
    b_inverse = (0x7F000000 - b_bits).to(tl.float32, bitcast=True)
    return b_bits.to(tl.float32, bitcast=True), b_inverse


@triton.jit
def scaled_rows(b_x, SCALED: tl.constexpr):
    """Rows as fp16 of at most 2, and what to multiply them by, [C]; as they are unless SCALED."""
    b_scale = tl.full([b_x.shape[0]], 1.0, tl.float32)
    if SCALED:
        b_x = b_x.to(tl.float32)
        b_scale, b_inverse = power_of_two(tl.max(tl.abs(b_x), axis=1))
        b_x = (b_x * b_inverse[:, None]).to(tl.float16)
    return b_x, b_scale


@triton.jit
def load_state(
    p_state, o_k, o_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """[BK, BV] of a state."""
    if K % BK == 0 and V % BV == 0:
        b_state = tl.load(p_state)
    else:
        b_state = tl.load(p_state, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
    return b_state


@triton.jit
def store_rows(x, b_x, start, T, stride, o_c, o_x, X):
    """The rows of a chunk, [C, X], in x's type."""
    p_x = x + start.to(tl.int64) * stride + o_c[:, None] * stride + o_x[None, :]
    mask = (o_c < T - start)[:, None] & (o_x < X)[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_documents(doc_ids, start, T, C: tl.constexpr, PACKED: tl.constexpr):
    """A chunk's documents [C]; beyond the sequence the last one."""
    o_c = tl.arange(0, C)
    b_document = o_c
    if PACKED:
        b_document = tl.load(doc_ids + start + tl.minimum(o_c, T - 1 - start))
    return b_document


@triton.jit
def of_pairs(b_x, doc_ids, start, T, o_s, o_t, PACKED: tl.constexpr):
    """b_x, a number a pair, where s <= t are tokens of one document, zero elsewhere; o_s and o_t
    are rows or columns. What is multiplied by it needs no mask of its own."""
    b_allowed = o_s <= o_t
    if PACKED:
        b_earlier = tl.load(doc_ids + start + tl.minimum(o_s, T - 1 - start))
        b_allowed = b_allowed & (
            b_earlier == tl.load(doc_ids + start + tl.minimum(o_t, T - 1 - start))
        )
    return tl.where(b_allowed, b_x, 0.0)


@triton.jit
def pair_decays(b_later, b_earlier):
    """exp(G_t - G_s); at most 1 where s > t, which count for nothing."""
    return tl.exp2(tl.minimum((b_later - b_earlier).to(tl.float32), 0.0))


@Kernel
@triton.jit
def prepare_kernel(
    g, step, doc_ids, sums, steps, from_start, to_end, outgoing, chunk_log,
    T, H,
    g_stride_b, g_stride_t, g_stride_h, step_stride_b, step_stride_t, step_stride_h,
    RESET: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The numbers of the tokens of a chunk, as above, and outgoing = to_end · steps; chunk_log is
    RESET where a document starts in the chunk.

    Grid: (N, blocks of H, B). Reads g and Δ once, writes five numbers a token and head: bound by
    memory.
    """
    chunk, chunks, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    start = chunk * C
    o_c, o_h = tl.arange(0, C), tl.program_id(1) * BH + tl.arange(0, BH)
    mask_h = o_h < H
    b_live = (o_c < T - start)[:, None] & mask_h[None, :]
    o_t = (start + o_c).to(tl.int64)[:, None]
    p_g = g + batch * g_stride_b + o_t * g_stride_t + o_h[None, :] * g_stride_h
    p_step = step + batch * step_stride_b + o_t * step_stride_t + o_h[None, :] * step_stride_h
    # Where decays are strong, differences of fp32 sums are not exact to fp32.
    b_g = tl.load(p_g, mask=b_live, other=0.0).to(sums.dtype.element_ty) * LOG2_E
    b_step = tl.load(p_step, mask=b_live, other=0.0).to(tl.float32)
    b_sum, b_total = tl.cumsum(b_g, axis=0), tl.sum(b_g, axis=0)
    b_from_start = tl.exp2(b_sum.to(tl.float32))
    b_to_end = tl.exp2(tl.minimum((b_total[None, :] - b_sum).to(tl.float32), 0.0))
    b_log = b_total.to(tl.float32)
    if PACKED:
        doc_ids += batch * T
        b_document = load_documents(doc_ids, start, T, C, PACKED)
        before = tl.load(doc_ids + start - 1, mask=start > 0, other=0)
        last = tl.load(doc_ids + start + tl.minimum(C, T - start) - 1)
        b_from_start = tl.where((b_document == before)[:, None], b_from_start, 0.0)
        b_to_end = tl.where((b_document == last)[:, None], b_to_end, 0.0)
        b_log = tl.where(last == before, b_log, RESET)
    b_to_end = tl.where(b_live, b_to_end, 0.0)
    row = batch * H + o_h
    tl.store(chunk_log + row * chunks + chunk, b_log, mask=mask_h)
    o = row[None, :] * (chunks * C) + o_t
    mask = mask_h[None, :] & (o_t >= 0)
    tl.store(sums + o, tl.where(b_live, b_sum, -1e30), mask=mask)
    tl.store(steps + o, b_step, mask=mask)
    tl.store(from_start + o, tl.where(b_live, b_from_start, 0.0), mask=mask)
    tl.store(to_end + o, b_to_end, mask=mask)
    tl.store(outgoing + o, b_to_end * b_step, mask=mask)


@triton.jit
def of_columns(x, stride, o_head, HEADS: tl.constexpr):
    """The numbers x[head · stride], one a column."""
    b_x = tl.zeros_like(o_head).to(tl.float32) + tl.load(x)
    for head in tl.static_range(1, HEADS):
        b_x = tl.where(o_head == head, tl.load(x + head * stride), b_x)
    return b_x


@Kernel
@triton.jit
def walk_kernel(
    y, z, weight, chunk_log, entering, states, scales, other, other_scales, across, log_decay,
    T, H, sharing, N, segment,
    y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t, z_stride_h,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    HEADS: tl.constexpr, SCALED: tl.constexpr, BORDERS: tl.constexpr, ACROSS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state Σ weight y zᵀ of a segment, of HEADS heads that share y side by side.

    Without BORDERS from zero: to `states` [B, S, H, X, Z] what the tokens leave at the segment's
    end, or in reverse at its start; forward also the segment's log decay. With BORDERS from
    `entering`: to `states` what enters each chunk, or in reverse the gradient of what leaves it.
    With ACROSS, of the chunk's `other` state, which enters it: <it, the gradient of what leaves> ·
    the chunk's decay, to `across` [blocks, B, H, N]. SCALED takes one block.

    Grid: (blocks of X times blocks of Z, S, B·H / HEADS). `segment` counts chunks. One program owns
    [BX, HEADS·BZ] of a segment's states. Reads y and z once: bound by memory.
    """
    blocks_z = tl.cdiv(Z, BZ)
    block_x, block_z = tl.program_id(0) // blocks_z, tl.program_id(0) % blocks_z
    groups = H // HEADS
    batch, first_head = tl.program_id(2) // groups, tl.program_id(2) % groups * HEADS
    first = tl.program_id(1) * segment
    chunks = tl.minimum(segment, N - first)
    row = (batch * H + first_head).to(tl.int64)
    o_c, o_x, o_column = tl.arange(0, C), block_x * BX + tl.arange(0, BX), tl.arange(0, HEADS * BZ)
    o_head, o_z = o_column // BZ, block_z * BZ + o_column % BZ
    mask_z = o_z < Z
    mask = (o_x < X)[:, None] & mask_z[None, :]
    y += batch.to(tl.int64) * y_stride_b + (first_head // sharing).to(tl.int64) * y_stride_h
    z += batch.to(tl.int64) * z_stride_b + first_head.to(tl.int64) * z_stride_h
    o_values = o_head * z_stride_h + o_z
    o_state = o_x[:, None] * Z + (o_head * (X * Z) + o_z)[None, :]
    weight += row * (N * C)
    chunk_log += row * N
    across += tl.program_id(0).to(tl.int64) * tl.num_programs(2) * HEADS * N

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * H + first_head
    if BORDERS:
        b_state = tl.load(entering + stretch * (X * Z) + o_state, mask=mask, other=0.0)
    else:
        b_state = tl.zeros([BX, HEADS * BZ], dtype=tl.float32)
    b_log = tl.zeros([HEADS * BZ], dtype=tl.float32)
    for i in range(chunks):
        chunk = first + (chunks - 1 - i if REVERSE else i)
        start = chunk * C
        o_row = tl.minimum(o_c, T - 1 - start)
        b_y = load_rows(y, start, T, y_stride_t, o_c, o_x, X, X % BX == 0)
        p_z = z + start.to(tl.int64) * z_stride_t + o_row[:, None] * z_stride_t + o_values[None, :]
        if Z % BZ == 0:
            b_z = tl.load(p_z)
        else:
            b_z = tl.load(p_z, mask=mask_z[None, :], other=0.0)
        b_chunk_log = of_columns(chunk_log + chunk, N, o_head, HEADS)
        b_through = tl.exp2(b_chunk_log)
        if BORDERS:
            o_chunk = ((batch.to(tl.int64) * N + chunk) * H + first_head) * (X * Z)
            b_stored = b_state
            if SCALED:
                b_inverse = tl.zeros([HEADS * BZ], dtype=tl.float32)
                for head in tl.static_range(HEADS):
                    b_size = tl.where((o_head == head)[None, :], tl.abs(b_state), 0.0)
                    scale, inverse = power_of_two(tl.max(tl.max(b_size, axis=1), axis=0))
                    tl.store(scales + (row + head) * N + chunk, scale)
                    b_inverse = tl.where(o_head == head, inverse, b_inverse)
                b_stored *= b_inverse[None, :]
            tl.store(states + o_chunk + o_state, b_stored.to(states.dtype.element_ty), mask=mask)
            if ACROSS:
                b_other = tl.load(other + o_chunk + o_state, mask=mask, other=0.0).to(tl.float32)
                b_other *= b_state * b_through[None, :]
                for head in tl.static_range(HEADS):
                    b_amount = tl.where((o_head == head)[None, :], b_other, 0.0)
                    amount = tl.sum(tl.sum(b_amount, axis=1), axis=0)
                    o_number = (row + head) * N + chunk
                    if SCALED:
                        amount *= tl.load(other_scales + o_number)
                    tl.store(across + o_number, amount)
        else:
            b_log += b_chunk_log
        p_weight = weight + start + o_c
        b_weight = tl.load(p_weight)[:, None]
        for head in tl.static_range(1, HEADS):
            b_next = tl.load(p_weight + head * (N * C))[:, None]
            b_weight = tl.where((o_head == head)[None, :], b_next, b_weight)
        b_z = b_z.to(tl.float32) * b_weight
        b_state = split_dot(tl.trans(b_y), b_z, b_state * b_through[None, :], SCALED, PRECISION)

    if not BORDERS:
        tl.store(states + stretch * (X * Z) + o_state, b_state, mask=mask)
        if not REVERSE:
            b_own = (o_column % BZ == 0) & (tl.program_id(0) == 0)
            tl.store(log_decay + stretch + o_head, b_log / LOG2_E, mask=b_own)


@Kernel
@triton.jit
def output_kernel(
    q, k, v, sums, steps, from_start, skip, doc_ids, states, scales, out,
    T, H, sharing, N,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t,
    v_stride_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HEADS: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a chunk, from the states that enter chunks; with SKIP also skip · v.

    Grid: (H / HEADS · N, B). One program owns the chunk's rows of HEADS heads that share q and k,
    one slice of SLICES a head after the other. Reads q and k once for all of them, v and the state:
    bound by memory.
    """
    groups = H // HEADS
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    batch = tl.program_id(1).to(tl.int64)
    start = chunk * C
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    shared = (group * HEADS // sharing).to(tl.int64)
    q += batch * q_stride_b + shared * q_stride_h
    k += batch * k_stride_b + shared * k_stride_h
    v += batch * v_stride_b
    out += batch * T * H * V
    states += (batch * N + chunk) * H * (K * V)
    if PACKED:
        doc_ids += batch * T
    b_q = load_rows(q, start, T, q_stride_t, o_c, o_k, K, K % BK == 0)
    b_k = load_rows(k, start, T, k_stride_t, o_c, o_k, K, K % BK == 0)
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_score = of_pairs(b_score, doc_ids, start, T, o_c[None, :], o_c[:, None], PACKED)
    b_q, b_q_scale = scaled_rows(b_q, SCALED)

    for i in range(HEADS * SLICES):
        head = (group * HEADS + i // SLICES).to(tl.int64)
        o_v = (i % SLICES) * BV + tl.arange(0, BV)
        o_token = (batch * H + head) * (N * C) + start + o_c
        p_state = states + head * (K * V) + o_k[:, None] * V + o_v[None, :]
        b_v = load_rows(v + head * v_stride_h, start, T, v_stride_t, o_c, o_v, V, V % BV == 0)
        b_state = load_state(p_state, o_k, o_v, K, V, BK, BV)
        b_out = tl.dot(b_q, b_state, input_precision=PRECISION)
        b_from_start = tl.load(from_start + o_token)
        if SCALED:
            p_scale = scales + (batch * H + head) * N + chunk
            b_from_start *= b_q_scale * tl.load(p_scale)
        b_out *= b_from_start[:, None]
        b_sum = tl.load(sums + o_token)
        b_pair = b_score * pair_decays(b_sum[:, None], b_sum[None, :])
        b_pair *= tl.load(steps + o_token)[None, :]
        b_out = tl.dot(b_pair.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        if SKIP:
            b_out += b_v.to(tl.float32) * tl.load(skip + head)
        store_rows(out + head * V, b_out, start, T, H * V, o_c, o_v, V)


@Kernel
@triton.jit
def value_gradient_kernel(
    q, k, v, do, sums, steps, to_end, skip, doc_ids, gradients, scales, dv, dstep, dskip, later,
    earlier, after, pairs,
    T, H, sharing, N,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t,
    v_stride_h, do_stride_b, do_stride_t, do_stride_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HEADS: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv and the gradients of Δ and skip of a chunk, from the gradients of the states that leave
    chunks; the pairs' factors of dq and dk, [s, t] summed over HEADS heads, to `pairs`
    [B, H / HEADS, N, C, C]; and of the decay's gradient, to `after` k·dk of what goes through the
    state, and to `later` and `earlier` what a token's pairs in the chunk gave it as the later and
    as the earlier of the two: one matrix gives both, so that they cancel where they must. dstep,
    dskip and these are [SLICES, B, H, L].

    Grid and slices as output_kernel's. Pairs are [s, t], rows are the keys: of 128 tokens they do
    not fit in registers.
    """
    groups = H // HEADS
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    batch = tl.program_id(1).to(tl.int64)
    start = chunk * C
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    shared = (group * HEADS // sharing).to(tl.int64)
    q += batch * q_stride_b + shared * q_stride_h
    k += batch * k_stride_b + shared * k_stride_h
    v += batch * v_stride_b
    do += batch * do_stride_b
    dv += batch * T * H * V
    gradients += (batch * N + chunk) * H * (K * V)
    if PACKED:
        doc_ids += batch * T
    b_k = load_rows(k, start, T, k_stride_t, o_c, o_k, K, K % BK == 0)
    b_q = load_rows(q, start, T, q_stride_t, o_c, o_k, K, K % BK == 0)
    b_score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    o_s, o_t = o_c[:, None], o_c[None, :]
    b_score = of_pairs(b_score, doc_ids, start, T, o_s, o_t, PACKED)
    b_pairs = tl.zeros([C, C], dtype=tl.float32)
    b_k, b_k_scale = scaled_rows(b_k, SCALED)

    for i in range(HEADS * SLICES):
        head = (group * HEADS + i // SLICES).to(tl.int64)
        o_v = (i % SLICES) * BV + tl.arange(0, BV)
        o_number = (batch * H + head) * (N * C) + start
        o_part = (((i % SLICES) * tl.num_programs(1) + batch) * H + head) * (N * C) + start
        p_gradient = gradients + head * (K * V) + o_k[:, None] * V + o_v[None, :]
        p_do = do + head * do_stride_h
        b_v = load_rows(v + head * v_stride_h, start, T, v_stride_t, o_c, o_v, V, V % BV == 0)
        b_step = tl.load(steps + o_number + o_c)
        b_gradient = load_state(p_gradient, o_k, o_v, K, V, BK, BV)
        b_dv = tl.dot(b_k, b_gradient, input_precision=PRECISION)
        b_to_end = tl.load(to_end + o_number + o_c)
        if SCALED:
            b_to_end *= b_k_scale * tl.load(scales + (batch * H + head) * N + chunk)
        b_dv *= b_to_end[:, None]
        b_after = tl.sum(b_v.to(tl.float32) * b_dv, axis=1)
        p_sum, p_later = sums + o_number, later + o_part
        b_do = load_rows(p_do, start, T, do_stride_t, o_c, o_v, V, V % BV == 0)
        b_decay = pair_decays(tl.load(p_sum + o_c)[None, :], tl.load(p_sum + o_c)[:, None])
        b_weight = (b_score * b_decay).to(b_do.dtype)
        b_dv = tl.dot(b_weight, b_do, b_dv, input_precision=PRECISION)
        b_pair = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * b_decay
        b_earlier = tl.sum(b_pair * b_score, axis=1)
        b_pair *= b_step[:, None]
        tl.store(p_later + o_c, tl.sum(b_pair * b_score, axis=0))
        b_pairs += b_pair
        b_dv *= b_step[:, None]
        if SKIP:
            b_do = load_rows(p_do, start, T, do_stride_t, o_c, o_v, V, V % BV == 0).to(tl.float32)
            b_dv += b_do * tl.load(skip + head)
            b_own = tl.where(o_c < T - start, tl.sum(b_v.to(tl.float32) * b_do, axis=1), 0.0)
            tl.store(dskip + o_part + o_c, b_own)
        store_rows(dv + head * V, b_dv, start, T, H * V, o_c, o_v, V)
        tl.store(dstep + o_part + o_c, b_earlier + b_after)
        tl.store(earlier + o_part + o_c, b_earlier * b_step)
        tl.store(after + o_part + o_c, b_after * b_step)
    p_pairs = pairs + ((batch * groups + group) * N + chunk) * (C * C)
    b_pairs = of_pairs(b_pairs, doc_ids, start, T, o_s, o_t, PACKED)
    tl.store(p_pairs + o_s * C + o_t, b_pairs.to(pairs.dtype.element_ty))


@Kernel
@triton.jit
def shared_gradient_kernel(
    x, z, own, weight, states, scales, pairs, out, seen,
    T, H, sharing, N,
    x_stride_b, x_stride_t, x_stride_h, z_stride_b, z_stride_t, z_stride_h, own_stride_b,
    own_stride_t, own_stride_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HEADS: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a chunk from x = do, z = k, own = q and the states that enter chunks, or dk from x = v,
    z = q and the gradients of those that leave them: Σ weight x Sᵀ over HEADS heads that share z,
    and `pairs` zᵀ of the same heads. With SEEN, dq, also to `seen` [SLICES, B, H, L] what of q·dq
    came through the state.

    Grid and slices as output_kernel's. Reads x and the states once: bound by memory.
    """
    groups = H // HEADS
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    batch = tl.program_id(1).to(tl.int64)
    start = chunk * C
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    shared = (group * HEADS // sharing).to(tl.int64)
    x += batch * x_stride_b
    z += batch * z_stride_b + shared * z_stride_h
    states += (batch * N + chunk) * H * (K * V)
    if SEEN:
        own += batch * own_stride_b + shared * own_stride_h
        b_own = load_rows(own, start, T, own_stride_t, o_c, o_k, K, K % BK == 0)
    b_out = tl.zeros([C, BK], dtype=tl.float32)
    for i in range(HEADS * SLICES):
        head = (group * HEADS + i // SLICES).to(tl.int64)
        o_v = (i % SLICES) * BV + tl.arange(0, BV)
        p_state = states + head * (K * V) + o_k[:, None] * V + o_v[None, :]
        b_x = load_rows(x + head * x_stride_h, start, T, x_stride_t, o_c, o_v, V, V % BV == 0)
        b_state = load_state(p_state, o_k, o_v, K, V, BK, BV)
        b_weight = tl.load(weight + (batch * H + head) * (N * C) + start + o_c)
        b_x, b_x_scale = scaled_rows(b_x, SCALED)
        if SCALED:
            b_weight *= b_x_scale * tl.load(scales + (batch * H + head) * N + chunk)
        b_part = tl.dot(b_x, tl.trans(b_state), input_precision=PRECISION) * b_weight[:, None]
        b_out += b_part
        if SEEN:
            row = ((i % SLICES) * tl.num_programs(1) + batch) * H + head
            b_amount = tl.sum(b_own.to(tl.float32) * b_part, axis=1)
            tl.store(seen + row * (N * C) + start + o_c, b_amount)
    p_pairs = pairs + ((batch * groups + group) * N + chunk) * (C * C)
    if SEEN:
        b_pairs = tl.load(p_pairs + o_c[:, None] + o_c[None, :] * C)
    else:
        b_pairs = tl.load(p_pairs + o_c[:, None] * C + o_c[None, :])
    b_z = load_rows(z, start, T, z_stride_t, o_c, o_k, K, K % BK == 0)
    b_out = tl.dot(b_pairs, b_z, b_out, input_precision=PRECISION)
    store_rows(out + (batch * T * groups + group) * K, b_out, start, T, groups * K, o_c, o_k, K)


@Kernel
@triton.jit
def decay_gradient_kernel(
    seen, later, earlier, after, across, dg,
    rows, N,
    C: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dg_τ, [B, H, L]: what every pair of tokens s < τ <= t gives the decay between them. Pairs in
    the chunk: the running sum of `later` - `earlier` from its end. With s before it: that of
    `seen`. With t behind it: the running sum of `after` from its start. Both: `across`.

    Grid: (blocks of B·H·N chunks). One program owns R chunks: bound by memory.
    """
    o_r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    mask = o_r < rows
    o = o_r[:, None] * C + tl.arange(0, C)[None, :]
    b_until = tl.zeros([R, C], dtype=tl.float32)
    b_after = tl.zeros([R, C], dtype=tl.float32)
    b_across = tl.zeros([R], dtype=tl.float32)
    size = rows.to(tl.int64) * C
    for i in tl.static_range(SLICES):
        b_until += tl.load(seen + i * size + o, mask=mask[:, None], other=0.0)
        b_until += tl.load(later + i * size + o, mask=mask[:, None], other=0.0)
        b_until -= tl.load(earlier + i * size + o, mask=mask[:, None], other=0.0)
        b_after += tl.load(after + i * size + o, mask=mask[:, None], other=0.0)
    for i in tl.static_range(BLOCKS):
        b_across += tl.load(across + i * rows + o_r, mask=mask, other=0.0)
    b_dg = tl.cumsum(b_until, axis=1, reverse=True) + tl.cumsum(b_after, axis=1) - b_after
    tl.store(dg + o, b_dg + b_across[:, None], mask=mask[:, None])
