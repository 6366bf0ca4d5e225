"""Kernels of the gated delta rule, forward and backward; without gates, of the delta rule.

With G the running sum of the gates in a chunk, D_ts = exp(G_t - G_s) where s <= t is of t's
document, else 0, and S the state that enters the chunk, what a token finds wrong in the state, its
residual r_t = v_t - exp(g_t) S_{t-1}ᵀ k_t, solves a unit lower triangular system (the WY form,
arXiv:2406.06484):

    R = V - exp(G) K S,    N_ts = D_ts k_t·k_s for s < t,    (1 + N β) r = R
    o = scale (exp(G) Q S + (D ⊙ Q Kᵀ) β r),    S' = exp(G_C) S + (exp(G_C - G) K)ᵀ β r

and its gradient, with dS' that of S', solves the transposed system:

    E = scale (D ⊙ Q Kᵀ)ᵀ do + exp(G_C - G) K dS',    (1 + β N)ᵀ e = E,    dv = dR = β e
    dβ = e·r,    dS = exp(G_C) dS' + scale (exp(G) Q)ᵀ do - (exp(G) K)ᵀ dv

One matrix serves both, the strictly lower triangular Y = -(1 + N β)⁻¹ N:

    r = R + Y (β R),    e = E + Yᵀ (β E).

What is not multiplied stays in fp32. Given d = β r, what a token writes, and dv, the gradients of q
and k are those of linear attention over the pairs (q, k) and (k, k),

    P_ts = scale D_ts do_t·d_s,    X_ts = -D_ts dv_t·d_s for s < t
    dq = scale exp(G) do Sᵀ + P K
    dk = Pᵀ Q + (X + Xᵀ) K + exp(G_C - G) d dS'ᵀ - exp(G) dv Sᵀ

The forward keeps d; where β is 0, r in its place (`written`), which dβ needs. It also keeps S
before every chunk, rounded as its products take it, and the walk back dS' after every chunk: what
q, k and g get is then a matter of each chunk alone, and nothing is carried from one to the next,
where it would drift.

Notation: B batch, T tokens, H value heads, K and V head sizes, C tokens a chunk, N chunks, S
segments; key head h // group serves value head h. q, k, v, o, d and gradients [B, T, H, ·], their
last axis contiguous; what a chunk's pairs have (Y, scores) [B, H, T, C]; states of segments
[B, S, H, K, V] and transitions [B, S, H, K, K] fp32, states of chunks [B, N, H, V, K]. `weights`
[5, B, H, T] fp32: β, 0 where it is 0 and else the decay until the chunk's end, that decay, the one
since the chunk's start, G in log2; decays are 0 where a document start lies between. Where nothing
decays, the first two.
`through` [B, H, N]: the decay over a whole chunk. `b_*` blocks in registers, `p_*` pointers, `o_*`
offsets. A document reaches across chunks as kernels/common/documents.py says.

A running state is the first factor of every product it is in, and so is what follows from it:
first factors come from registers, second ones from shared memory, where loads have put them. A
walk's loads are waited for as soon as they are asked for, so the chunk after is asked for early, as
far as L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.simple_gla.triton_kernels import TOKEN_DECAY, chunk_decay, pair_decay

BETA: tl.constexpr = tl.constexpr(0)
WRITTEN_TO_END: tl.constexpr = tl.constexpr(1)
TO_END: tl.constexpr = tl.constexpr(2)
FROM_START: tl.constexpr = tl.constexpr(3)
LOG_DECAY: tl.constexpr = tl.constexpr(4)


@triton.jit
def load_tile(x, start, T, stride_t, o_x, size: tl.constexpr, C: tl.constexpr):
    """[C, len(o_x)] of the chunk at `start`; zeros beyond T and beyond `size`."""
    o_c = tl.arange(0, C)
    p_x = x + start.to(tl.int64) * stride_t + (o_c[:, None] * stride_t + o_x[None, :])
    return tl.load(p_x, mask=(o_c < T - start)[:, None] & (o_x < size)[None, :], other=0.0)


@triton.jit
def load_pairs(x, start, T, C: tl.constexpr):
    """[C, C] of the chunk at `start`; x points to the sequence's first row."""
    o_c = tl.arange(0, C)
    p_x = x + start.to(tl.int64) * C + (o_c[:, None] * C + o_c[None, :])
    return tl.load(p_x, mask=(o_c < T - start)[:, None], other=0.0)


@triton.jit
def load_state(x, chunk, o_v, o_k, V: tl.constexpr, K: tl.constexpr):
    """[len(o_v), len(o_k)] of a chunk's transposed state."""
    mask = (o_v < V)[:, None] & (o_k < K)[None, :]
    return tl.load(x + chunk * V * K + (o_v[:, None] * K + o_k[None, :]), mask=mask, other=0.0)


@triton.jit
def store_state(x, b_state, chunk, o_v, o_k, V: tl.constexpr, K: tl.constexpr):
    mask = (o_v < V)[:, None] & (o_k < K)[None, :]
    tl.store(x + chunk * V * K + (o_v[:, None] * K + o_k[None, :]), b_state, mask=mask)


@triton.jit
def load_weight(weights, KIND: tl.constexpr, start, T, C: tl.constexpr):
    """[C] of the chunk at `start`, 0 beyond T; weights points to the sequence's first token."""
    o_c = tl.arange(0, C)
    p_weight = weights + KIND * (tl.num_programs(2).to(tl.int64) * T) + start + o_c
    return tl.load(p_weight, mask=o_c < T - start, other=0.0)


@triton.jit
def store_row_sums(b_x, sums, start, T, C: tl.constexpr, BX: tl.constexpr):
    """Sums over each 16 of the BX rows of b_x [BX, C], to `sums` [BX // 16, B, H, T]; a warp of a
    tensor-core product has all 16, so that no warp waits for another."""
    o_part, o_token = tl.arange(0, BX // 16), start + tl.arange(0, C)
    p_sum = sums + (o_part[:, None] * (tl.num_programs(2).to(tl.int64) * T) + o_token[None, :])
    b_sum = tl.sum(tl.reshape(b_x, [BX // 16, 16, C]), axis=1)
    tl.store(p_sum, b_sum, mask=(o_token < T)[None, :])


@triton.jit
def load_row_sums(sums, parts, start, T, C: tl.constexpr):
    """[C]: the sum of `parts` of them."""
    o_token = start + tl.arange(0, C)
    b_sum = tl.zeros([C], dtype=tl.float32)
    for part in range(parts):
        p_sum = sums + (part * (tl.num_programs(2).to(tl.int64) * T) + o_token)
        b_sum += tl.load(p_sum, mask=o_token < T, other=0.0)
    return b_sum


@triton.jit
def to_l2(pointers):
    """Asks for the 128 bytes around each pointer, and waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], tl.int32, False, 1
    )


@triton.jit
def tile_to_l2(x, start, T, stride_t, first_x, C: tl.constexpr, BX: tl.constexpr):
    """What `load_tile` will read of [C, BX] at `start`, which may lie outside the sequence."""
    LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
    o_token = tl.minimum(tl.maximum(start + tl.arange(0, C), 0), T - 1).to(tl.int64)
    o_x = tl.maximum(first_x, 0) + LINE * tl.arange(0, BX // LINE)
    to_l2(x + (o_token[:, None] * stride_t + o_x[None, :]))


@triton.jit
def chunk_to_l2(weights, x, start, T, C: tl.constexpr, PLANES: tl.constexpr, PAIRS: tl.constexpr):
    """The first PLANES weights, and with PAIRS what `load_pairs` will read, at `start`."""
    o_line = tl.minimum(tl.maximum(start, 0) + tl.arange(0, 2) * 32, T - 1)
    o_plane = tl.minimum(tl.arange(0, 8), PLANES - 1) * (tl.num_programs(2).to(tl.int64) * T)
    to_l2(weights + (o_plane[:, None] + o_line[None, :]))
    if PAIRS:
        tile_to_l2(x, start, T, C, 0, C, C)


@triton.jit
def unscaled_inverse(b_n, b_beta, C: tl.constexpr, PRECISION: tl.constexpr):
    """Y = -(1 + N β)⁻¹ N for a strictly lower triangular N [C, C]: by substitution in the 16×16
    blocks of the diagonal, then twice the size at a time,

        Y_21 = -(1 + Y_22 β_2) N_21 (1 + β_1 Y_11).
    """
    BLOCKS: tl.constexpr = C // 16
    o_block, o_row = tl.arange(0, BLOCKS), tl.arange(0, 16)
    b_diagonal = (o_block[:, None] == o_block[None, :])[:, None, :, None]
    b_block = tl.reshape(b_n, [BLOCKS, 16, BLOCKS, 16])
    b_block = tl.sum(tl.where(b_diagonal, b_block, 0.0), axis=2)  # [BLOCKS, 16, 16]
    b_factor = b_block * tl.reshape(b_beta, [BLOCKS, 16])[:, None, :]
    b_solved = -b_block
    for j in range(1, 15):
        b_row = tl.sum(tl.where((o_row == j)[None, :, None], b_solved, 0.0), axis=1)
        b_column = tl.sum(tl.where((o_row == j)[None, None, :], b_factor, 0.0), axis=2)
        b_solved -= b_column[:, :, None] * b_row[:, None, :]
    b_y = tl.reshape(tl.where(b_diagonal, b_solved[:, :, None, :], 0.0), [C, C])

    o_t, o_s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    LEVELS: tl.constexpr = 2 if C == 64 else (1 if C == 32 else 0)
    for level in tl.static_range(LEVELS):
        size = 16 << level
        b_below = (o_t // size % 2 == 1) & (o_s // size == o_t // size - 1)
        b_part = tl.where(b_below, b_n, 0.0)
        b_part = tl.dot(b_part * b_beta[None, :], b_y, b_part, input_precision=PRECISION)
        b_y -= tl.dot(b_y * b_beta[None, :], b_part, b_part, input_precision=PRECISION)
    return b_y


@Kernel
@triton.jit
def prepare_kernel(
    q, k, g, beta, doc_ids, inverse, scores, weights, through,
    T, H, group, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, GATES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y, the scores scale D ⊙ Q Kᵀ, and the weights.

    Grid: (N, 1, B·H). Reads q and k once, writes 2 C numbers a token; limited by the substitution's
    latency.
    """
    chunk, row = tl.program_id(0), tl.program_id(2)
    start, batch, head = chunk * C, row // H, row % H
    q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    beta += batch.to(tl.int64) * beta_stride_b + head.to(tl.int64) * beta_stride_h
    if DECAY:
        if GATES == TOKEN_DECAY:
            g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
        if PACKED:
            doc_ids += batch.to(tl.int64) * T
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    plane = tl.num_programs(2).to(tl.int64) * T
    p_weight = weights + row.to(tl.int64) * T + start + o_c
    beta += start.to(tl.int64) * beta_stride_t
    b_beta = tl.load(beta + o_c * beta_stride_t, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(p_weight + BETA * plane, b_beta, mask=mask_c)
    b_written = tl.where(b_beta == 0, 0.0, 1.0)

    b_keys, b_scores = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=1):
        o_k = first_k + tl.arange(0, BK)
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision=PRECISION)
        b_keys = tl.dot(b_k, tl.trans(b_k), b_keys, input_precision=PRECISION)
    if DECAY:
        b_sum, b_document, b_from_start, b_to_end, b_through = chunk_decay(
            g, doc_ids, start, T, g_stride_t, 0.0, C, GATES, PACKED
        )
        tl.store(p_weight + LOG_DECAY * plane, b_sum, mask=mask_c)
        tl.store(p_weight + FROM_START * plane, b_from_start, mask=mask_c)
        tl.store(p_weight + TO_END * plane, b_to_end, mask=mask_c)
        b_written *= b_to_end
        tl.store(through + row * tl.num_programs(0) + chunk, b_through)
        b_decay = pair_decay(b_sum, b_document, C, PACKED, False)
    else:
        b_decay = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)
    tl.store(p_weight + WRITTEN_TO_END * plane, b_written, mask=mask_c)

    o_pairs = (row.to(tl.int64) * T + start) * C + o_c[:, None] * C + o_c[None, :]
    b_scores *= b_decay * scale
    tl.store(scores + o_pairs, b_scores.to(scores.dtype.element_ty), mask=mask_c[:, None])
    b_n = tl.where(o_c[:, None] > o_c[None, :], b_keys * b_decay, 0.0)
    b_y = unscaled_inverse(b_n, b_beta, C, PRECISION)
    tl.store(inverse + o_pairs, b_y.to(inverse.dtype.element_ty), mask=mask_c[:, None])


@Kernel
@triton.jit
def value_walk_kernel(
    q, k, v, weights, through, inverse, scores, entering, leaving, transition, out, written, states,
    T, H, group, segment, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, SUMMARIZE: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence over a segment's chunks. SUMMARIZE: from a state of zero, and on the columns
    of the identity without values; writes the state and the transition that the segment ends in.
    Otherwise from the entering state; writes o, the state after the last segment, and with KEEP d
    and the state before each chunk.

    Grid: (blocks of V, and of K for the transition, S, B·H). One program owns [BV, BK >= K] of the
    transposed state. Reads k and Y once a block (and q and the scores), v once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    v += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    weights += row.to(tl.int64) * T
    through += row * tl.cdiv(T, C)
    inverse += row.to(tl.int64) * T * C
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_state = o_k[None, :] * V + o_v[:, None]
    mask_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    o_column = o_v - tl.cdiv(V, BV) * BV  # of the identity; negative in a block of values
    if SUMMARIZE:
        b_state = tl.where(o_column[:, None] == o_k[None, :], 1.0, 0.0)
    else:
        q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
        scores += row.to(tl.int64) * T * C
        out += (batch.to(tl.int64) * T * H + head) * V
        written += (batch.to(tl.int64) * T * H + head) * V
        b_state = tl.load(entering + stretch * K * V + o_state, mask=mask_state, other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + i * C
        if STAGES > 1:
            tile_to_l2(k, start + C, T, k_stride_t, 0, C, BK)
            tile_to_l2(v, start + C, T, v_stride_t, tl.minimum(block * BV, V - BV), C, BV)
            chunk_to_l2(weights, inverse, start + C, T, C, 4 if DECAY else 2, True)
            if not SUMMARIZE:
                tile_to_l2(q, start + C, T, q_stride_t, 0, C, BK)
                tile_to_l2(scores, start + C, T, C, 0, C, C)
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_factor = b_state.to(b_k.dtype)
        if KEEP:
            o_chunk = (batch * tl.cdiv(T, C) + start // C).to(tl.int64) * H + head
            store_state(states, b_factor, o_chunk, o_v, o_k, V, K)
        b_r = tl.dot(b_factor, tl.trans(b_k), input_precision=PRECISION)  # [BV, C]
        if DECAY:
            b_from_start = load_weight(weights, FROM_START, start, T, C)[None, :]
            b_r *= b_from_start
        b_v = tl.trans(load_tile(v, start, T, v_stride_t, o_v, V, C))  # [BV, C]
        b_beta = load_weight(weights, BETA, start, T, C)[None, :]
        b_r = b_v.to(tl.float32) - b_r
        b_y = load_pairs(inverse, start, T, C)
        b_r = tl.dot((b_r * b_beta).to(b_k.dtype), tl.trans(b_y), b_r, input_precision=PRECISION)
        b_written = b_r * b_beta
        if not SUMMARIZE:
            b_scores = load_pairs(scores, start, T, C)
            b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
            b_out = tl.dot(b_factor, tl.trans(b_q), input_precision=PRECISION)
            if DECAY:
                b_out *= scale * b_from_start
            else:
                b_out *= scale
            b_out = tl.dot(
                b_written.to(b_k.dtype), tl.trans(b_scores), b_out, input_precision=PRECISION
            )
            o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
            mask = (o_c < T - start)[None, :] & (o_v < V)[:, None]
            tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=mask)
            if KEEP:
                b_kept = b_r * tl.where(b_beta == 0, 1.0, b_beta)
                tl.store(written + o_out, b_kept.to(written.dtype.element_ty), mask=mask)
        if DECAY:
            b_written *= load_weight(weights, TO_END, start, T, C)[None, :]
            b_state *= tl.load(through + start // C)
        b_state = tl.dot(b_written.to(b_k.dtype), b_k, b_state, input_precision=PRECISION)

    if SUMMARIZE:
        tl.store(leaving + stretch * K * V + o_state, b_state, mask=mask_state)
        p_transition = transition + stretch * K * K + o_k[None, :] * K + o_column[:, None]
        mask = (o_k < K)[None, :] & ((o_column >= 0) & (o_column < K))[:, None]
        tl.store(p_transition, b_state, mask=mask)
    else:
        if segment_index == tl.num_programs(1) - 1:
            tl.store(leaving + row.to(tl.int64) * K * V + o_state, b_state, mask=mask_state)


@Kernel
@triton.jit
def value_gradient_kernel(
    q, k, do, weights, through, inverse, scores, written, leaving_gradient, entering_gradient,
    dv, beta_sums, state_gradients,
    T, H, group, segment, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, SUMMARIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient over a segment's chunks, from the last. SUMMARIZE: from zero; writes
    what the segment begins with. Otherwise from that of the leaving state; writes dv, that of the
    state after each chunk and of the first segment's entering state, and of each 16 rows of V
    e·d.

    Grid: (blocks of V, S, B·H). One program owns [BV, BK >= K] of the transposed gradient. Reads
    q, k, Y and the scores once a block, do (and d) once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    weights += row.to(tl.int64) * T
    through += row * tl.cdiv(T, C)
    inverse += row.to(tl.int64) * T * C
    scores += row.to(tl.int64) * T * C
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_state = o_k[None, :] * V + o_v[:, None]
    mask_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    if SUMMARIZE:
        b_gradient = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        dv += (batch.to(tl.int64) * T * H + head) * V
        written += (batch.to(tl.int64) * T * H + head) * V
        beta_sums += (block * (BV // 16) * tl.num_programs(2) + row).to(tl.int64) * T
        p_state = leaving_gradient + stretch * K * V + o_state
        b_gradient = tl.load(p_state, mask=mask_state, other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i) * C
        if STAGES > 1:
            tile_to_l2(q, start - C, T, q_stride_t, 0, C, BK)
            tile_to_l2(k, start - C, T, k_stride_t, 0, C, BK)
            tile_to_l2(do, start - C, T, do_stride_t, tl.minimum(block * BV, V - BV), C, BV)
            tile_to_l2(scores, start - C, T, C, 0, C, C)
            chunk_to_l2(weights, inverse, start - C, T, C, 4 if DECAY else 2, True)
            if not SUMMARIZE:
                tile_to_l2(written, start - C, T, H * V, tl.minimum(block * BV, V - BV), C, BV)
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_factor = b_gradient.to(b_k.dtype)
        if not SUMMARIZE:
            o_chunk = (batch * tl.cdiv(T, C) + start // C).to(tl.int64) * H + head
            store_state(state_gradients, b_factor, o_chunk, o_v, o_k, V, K)
            b_kept = tl.trans(load_tile(written, start, T, H * V, o_v, V, C))  # [BV, C]
        b_e = tl.dot(b_factor, tl.trans(b_k), input_precision=PRECISION)
        b_do = tl.trans(load_tile(do, start, T, do_stride_t, o_v, V, C))  # [BV, C]
        b_seen = scale
        if DECAY:
            b_seen *= load_weight(weights, FROM_START, start, T, C)[None, :]
            b_gradient *= tl.load(through + start // C)
        b_seen = (b_do * b_seen).to(b_k.dtype)
        b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
        b_gradient = tl.dot(b_seen, b_q, b_gradient, input_precision=PRECISION)
        if DECAY:
            b_e *= load_weight(weights, TO_END, start, T, C)[None, :]
        b_scores = load_pairs(scores, start, T, C)
        b_e = tl.dot(b_do, b_scores, b_e, input_precision=PRECISION)
        b_y = load_pairs(inverse, start, T, C)
        b_beta = load_weight(weights, BETA, start, T, C)[None, :]
        b_e = tl.dot((b_e * b_beta).to(b_k.dtype), b_y, b_e, input_precision=PRECISION)
        if not SUMMARIZE:
            store_row_sums(b_e * b_kept, beta_sums, start, T, C, BV)
            o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
            mask = (o_c < T - start)[None, :] & (o_v < V)[:, None]
            tl.store(dv + o_out, (b_e * b_beta).to(dv.dtype.element_ty), mask=mask)
        b_looked = -b_beta
        if DECAY:
            b_looked *= load_weight(weights, FROM_START, start, T, C)[None, :]
        b_e *= b_looked
        b_gradient = tl.dot(b_e.to(b_k.dtype), b_k, b_gradient, input_precision=PRECISION)

    if SUMMARIZE:
        tl.store(entering_gradient + stretch * K * V + o_state, b_gradient, mask=mask_state)
    else:
        if segment_index == 0:
            p_state = entering_gradient + row.to(tl.int64) * K * V + o_state
            tl.store(p_state, b_gradient, mask=mask_state)


@Kernel
@triton.jit
def key_gradient_kernel(
    q, k, do, dv, written, weights, through, doc_ids, states, state_gradients, beta_sums,
    dq, dk, dg, dbeta,
    T, H, group, scale, parts,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk of a chunk, and dβ; with SUMS each block of K its part of dg.

    dg_t is what all pairs of tokens s < t <= t' give the decay between them. A pair inside the
    chunk is added at t' and taken off at s, with P and X as the products round them, so that it
    cancels where it must. What all s before the chunk give comes through its state, in dq and dk;
    what all t' after it give, through the state's gradient, in dk; both at once, across the whole
    chunk, are <S, dS'> times its decay.

    Grid: (N times blocks of K, 1, B·H). Reads do, dv, d once a block, q, k and both states once.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    block, chunk, row = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, tl.program_id(2)
    start, batch, head = chunk * C, row // H, row % H
    q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    dv += (batch.to(tl.int64) * T * H + head) * V
    written += (batch.to(tl.int64) * T * H + head) * V
    weights += row.to(tl.int64) * T
    o_c, o_k = tl.arange(0, C), block * BK + tl.arange(0, BK)
    mask_c = o_c < T - start
    o_chunk = (batch * tl.cdiv(T, C) + chunk).to(tl.int64) * H + head

    b_query, b_key = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    b_dq, b_dk = tl.zeros([C, BK], dtype=tl.float32), tl.zeros([C, BK], dtype=tl.float32)
    b_dk_after, b_across = tl.zeros([C, BK], dtype=tl.float32), tl.zeros([BK, BK], dtype=tl.float32)
    for first_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = first_v + tl.arange(0, BV)
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_written = load_tile(written, start, T, H * V, o_v, V, C)
        b_state = load_state(states, o_chunk, o_v, o_k, V, K)
        b_gradient = load_state(state_gradients, o_chunk, o_v, o_k, V, K)
        b_dq = tl.dot(b_do, b_state, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_dv, b_state, b_dk, input_precision=PRECISION)
        b_query = tl.dot(b_do, tl.trans(b_written), b_query, input_precision=PRECISION)
        b_key = tl.dot(b_dv, tl.trans(b_written), b_key, input_precision=PRECISION)
        b_dk_after = tl.dot(b_written, b_gradient, b_dk_after, input_precision=PRECISION)
        if SUMS:
            b_across = tl.dot(tl.trans(b_state), b_gradient, b_across, input_precision=PRECISION)

    if SUMS:
        across = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_across, 0.0))
        across *= tl.load(through + row * tl.cdiv(T, C) + chunk)
    b_beta = load_weight(weights, BETA, start, T, C)
    b_seen, b_exponent, b_document = scale, tl.zeros([C], dtype=tl.float32), o_c
    b_looked = -1.0
    if DECAY:
        b_from_start = load_weight(weights, FROM_START, start, T, C)[:, None]
        b_seen, b_looked = b_from_start * scale, -b_from_start
        o_token = tl.minimum(start + o_c, T - 1)  # G goes on as it is beyond T: no exponent rises
        b_exponent = tl.load(weights + LOG_DECAY * (tl.num_programs(2).to(tl.int64) * T) + o_token)
        if PACKED:
            b_document = tl.load(doc_ids + batch.to(tl.int64) * T + o_token)
    b_dq *= b_seen
    b_dk *= b_looked
    b_dk_after *= load_weight(weights, WRITTEN_TO_END, start, T, C)[:, None]
    b_written_exponent = tl.where(b_beta == 0, float("inf"), b_exponent)
    if SUMS:  # a token's pair with itself has no decay: not in the sums, where it would be rounded
        b_pair = o_c[:, None] > o_c[None, :]
        b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_query, 0.0), axis=1)
        b_own *= tl.where(b_beta == 0, 0.0, scale)
    else:
        b_pair = o_c[:, None] >= o_c[None, :]
    if PACKED:
        b_pair = b_pair & (b_document[:, None] == b_document[None, :])
    b_exponent = b_exponent[:, None] - b_written_exponent[None, :]
    b_decay = tl.exp2(tl.where(b_pair, b_exponent, float("-inf")))
    b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
    b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
    b_query = (b_query * (b_decay * scale)).to(b_k.dtype)
    b_key *= -b_decay
    if not SUMS:
        b_key = tl.where(o_c[:, None] > o_c[None, :], b_key, 0.0)
    b_key = b_key.to(b_k.dtype)
    b_dq = tl.dot(b_query, b_k, b_dq, input_precision=PRECISION)
    if SUMS:
        b_before = tl.sum(b_q * b_dq, axis=1)
        b_dq += b_own[:, None] * b_k
    o_out = ((batch.to(tl.int64) * T + start) * H + head) * K + (o_c[:, None] * (H * K) + o_k)
    mask = mask_c[:, None] & (o_k < K)[None, :]
    tl.store(dq + o_out, b_dq.to(dq.dtype.element_ty), mask=mask)
    b_dk = tl.dot(b_key, b_k, b_dk, input_precision=PRECISION)
    b_inside = tl.dot(tl.trans(b_query), b_q, input_precision=PRECISION)
    b_inside = tl.dot(tl.trans(b_key), b_k, b_inside, input_precision=PRECISION)
    if SUMS:
        b_before += tl.sum(b_k * (b_dk - b_inside), axis=1)
        b_after = tl.sum(b_k * b_dk_after, axis=1)
        b_inside += b_own[:, None] * b_q
        b_amount = tl.where(o_c[:, None] >= o_c[None, :], b_before[:, None], b_after[:, None])
        if PACKED:
            b_amount = tl.where(b_document[:, None] == b_document[None, :], b_amount, 0.0)
        dg += (block * (tl.num_programs(2) // H) + batch).to(tl.int64) * T * H + head
        p_dg = dg + (start + o_c).to(tl.int64) * H
        tl.store(p_dg, tl.sum(b_amount, axis=0) + across, mask=mask_c)
    tl.store(dk + o_out, (b_dk + b_inside + b_dk_after).to(dk.dtype.element_ty), mask=mask)
    if block == 0:
        b_dbeta = load_row_sums(beta_sums + row.to(tl.int64) * T, parts, start, T, C)
        b_dbeta /= tl.where(b_beta == 0, 1.0, b_beta)
        tl.store(dbeta + (batch.to(tl.int64) * T + start + o_c) * H + head, b_dbeta, mask=mask_c)
