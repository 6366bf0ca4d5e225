"""Kernels of simple GLA, forward and backward.

With a scalar decay a head, every output and gradient is one of two sums over the pairs of tokens
s <= t, D_ts = exp(G_t - G_s):

    forward in time     o_t  = Σ D_ts (q_t·k_s) v_s        dq_t = Σ D_ts (do_t·v_s) k_s
    backward in time    dv_s = Σ D_ts (k_s·q_t) do_t       dk_s = Σ D_ts (v_s·do_t) q_t

each of the form Σ D (x·y) z. `value_kernel` computes those on the left, `key_kernel` those on the
right, walking the chunks of a segment with the running state Σ y zᵀ in registers;
`summarize_kernel` computes a segment's state from zero. States of chunks are written to memory only
for the decay's gradient. A weight a token and head, a step Δ, makes D_ts = exp(G_t - G_s) Δ_s.

Notation: B batch, T tokens, H heads, K and V head sizes; X, Z the sizes of x (and y) and of z; C
tokens a chunk; S segments. v, o and their gradients are [B, T, H, V], q and k [B, T, Q, K] with
Q heads that serve H / Q heads of v each; their last axis is contiguous. States are
[B, S, H, K, V] fp32.
`b_*` blocks in registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.segments import LOG2_E

NO_DECAY: tl.constexpr = tl.constexpr(0)
HEAD_DECAY: tl.constexpr = tl.constexpr(1)
TOKEN_DECAY: tl.constexpr = tl.constexpr(2)


@triton.jit
def chunk_decay(
    g, doc_ids, start, T, g_stride_t, head_decay,
    C: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr = False,
):  # fmt: skip
    """What happens between the tokens of the chunk at `start`; g and doc_ids point to the
    sequence's first token.

    Returns: G [C] in log2 (fp64 if EXACT: where decays are strong, differences of fp32 sums are
    not exact to fp32), document [C], the decay from the chunk's start to each token [C] and
    from each token to its end [C] (0 where a document start lies between), and the decay over the
    whole chunk.
    """
    o_c = tl.arange(0, C)
    valid = T - start
    if DECAY == TOKEN_DECAY:
        p_g = g + start.to(tl.int64) * g_stride_t + o_c * g_stride_t
        b_g = tl.load(p_g, mask=o_c < valid, other=0.0).to(tl.float64 if EXACT else tl.float32)
        b_g *= LOG2_E
        b_total = tl.sum(b_g, axis=0)
        b_sum = tl.cumsum(b_g, axis=0)
    else:
        b_sum = (o_c + 1).to(tl.float32) * head_decay
        b_total = tl.minimum(valid, C).to(tl.float32) * head_decay
    b_from_start = tl.exp2(b_sum.to(tl.float32))
    b_to_end = tl.exp2(tl.minimum((b_total - b_sum).to(tl.float32), 0.0))
    b_through = tl.exp2(b_total.to(tl.float32))
    b_document = o_c
    if PACKED:
        b_document = tl.load(doc_ids + start + tl.minimum(o_c, valid - 1))
        before = tl.load(doc_ids + start - 1, mask=start > 0, other=0)
        last = tl.load(doc_ids + start + tl.minimum(C, valid) - 1)
        b_from_start = tl.where(b_document == before, b_from_start, 0.0)
        b_to_end = tl.where(b_document == last, b_to_end, 0.0)
        b_through = tl.where(last == before, b_through, 0.0)
    return b_sum, b_document, b_from_start, b_to_end, b_through


@triton.jit
def pair_decay(b_sum, b_document, C: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """D [C, C]: exp(G_t - G_s) for s <= t of one document, else 0; rows are t, or in reverse s."""
    o_c = tl.arange(0, C)
    if REVERSE:
        b_pair = o_c[:, None] <= o_c[None, :]
        b_exponent = b_sum[None, :] - b_sum[:, None]
    else:
        b_pair = o_c[:, None] >= o_c[None, :]
        b_exponent = b_sum[:, None] - b_sum[None, :]
    if PACKED:
        b_pair = b_pair & (b_document[:, None] == b_document[None, :])
    return tl.exp2(tl.where(b_pair, b_exponent.to(tl.float32), float("-inf")))


@triton.jit
def head_log2_decay(g, head, DECAY: tl.constexpr):
    if DECAY == HEAD_DECAY:
        return tl.load(g + head).to(tl.float32) * LOG2_E
    return 0.0


@triton.jit
def live_decay(
    g, doc_ids, start, T, g_stride_t, head_decay,
    C: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`chunk_decay` where rows beyond the sequence hold its last token: nothing comes out of
    them."""
    b_sum, b_document, b_from_start, b_to_end, b_through = chunk_decay(
        g, doc_ids, start, T, g_stride_t, head_decay, C, DECAY, PACKED, EXACT
    )
    b_live = tl.arange(0, C) < T - start
    b_sum = tl.where(b_live, b_sum, -1e30)
    b_from_start = tl.where(b_live, b_from_start, 0.0)
    b_to_end = tl.where(b_live, b_to_end, 0.0)
    return b_sum, b_document, b_from_start, b_to_end, b_through


@triton.jit
def load_rows(x, start, T, stride, o_c, o_x, X, EVEN: tl.constexpr):
    """[C, X] of a sequence's rows from `start` on; beyond its end the last row again. Masks of
    rows would be carried from one chunk to the next, in registers."""
    o_row = tl.minimum(o_c, T - 1 - start)
    p_x = x + start.to(tl.int64) * stride + o_row[:, None] * stride + o_x[None, :]
    if EVEN:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_x < X)[None, :], other=0.0)
    return b_x


@Kernel
@triton.jit
def summarize_kernel(
    y, z, g, step, doc_ids, state, log_decay,
    T, H, sharing, segment, scale,
    y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t, z_stride_h, g_stride_b, g_stride_t,
    g_stride_h, step_stride_b, step_stride_t, step_stride_h,
    RESET: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    BZ: tl.constexpr, DECAY: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state Σ y zᵀ that a segment's tokens leave at its end, or in reverse at its start.

    Grid: (blocks of X times blocks of Z, S, B·H). One program owns [BX, BZ] of a segment's state.
    Reads y and z once, writes one state a segment: bound by memory. Forward: also writes the
    segment's log decay, RESET where a document starts in it.
    """
    blocks_z = tl.cdiv(Z, BZ)
    block_x, block_z = tl.program_id(0) // blocks_z, tl.program_id(0) % blocks_z
    segment_index, batch, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    end = tl.minimum(first + segment, T)
    chunks = tl.cdiv(end - first, C)
    o_c, o_x, o_z = (
        tl.arange(0, C),
        block_x * BX + tl.arange(0, BX),
        block_z * BZ + tl.arange(0, BZ),
    )
    mask_x, mask_z = o_x < X, o_z < Z
    y += batch.to(tl.int64) * y_stride_b + (head // sharing).to(tl.int64) * y_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    head_decay = head_log2_decay(g, head, DECAY)
    if DECAY == TOKEN_DECAY:
        g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    if STEP:
        step += batch.to(tl.int64) * step_stride_b + head.to(tl.int64) * step_stride_h
    if PACKED:
        doc_ids += batch.to(tl.int64) * T

    b_state = tl.zeros([BX, BZ], dtype=tl.float32)
    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        b_y = load_rows(y, start, T, y_stride_t, o_c, o_x, X, X % BX == 0)
        b_z = load_rows(z, start, T, z_stride_t, o_c, o_z, Z, Z % BZ == 0)
        _, _, b_from_start, b_to_end, b_through = live_decay(
            g, doc_ids, start, T, g_stride_t, head_decay, C, DECAY, PACKED, PRECISION == "ieee"
        )
        b_weight = b_from_start * scale if REVERSE else b_to_end * scale
        if STEP and not REVERSE:
            p_step = step + (start + o_c).to(tl.int64) * step_stride_t
            b_weight *= tl.load(p_step, mask=mask_c, other=0.0)
        b_z = (b_z.to(tl.float32) * b_weight[:, None]).to(b_y.dtype)
        b_state = tl.dot(tl.trans(b_y), b_z, b_state * b_through, input_precision=PRECISION)

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * X * Z + o_x[:, None] * Z + o_z[None, :]
    tl.store(p_state, b_state, mask=mask_x[:, None] & mask_z[None, :])

    if not REVERSE:
        if tl.program_id(0) == 0:
            total = (end - first).to(tl.float32) * head_decay
            if DECAY == TOKEN_DECAY:
                b_total = tl.zeros([C], dtype=tl.float32)
                for start in range(first, end, C):
                    p_g = g + (start + o_c).to(tl.int64) * g_stride_t
                    b_total += tl.load(p_g, mask=start + o_c < end, other=0.0).to(tl.float32)
                total = tl.sum(b_total, axis=0) * LOG2_E
            if PACKED:
                before = tl.load(doc_ids + first - 1, mask=first > 0, other=0)
                if tl.load(doc_ids + end - 1) != before:
                    total = RESET
            tl.store(log_decay + stretch, total / LOG2_E)


@Kernel
@triton.jit
def value_kernel(
    x, y, z, own, g, step, skip, doc_ids, state, out, step_gradient, skip_gradient,
    T, H, sharing, segment, scale,
    x_stride_b, x_stride_t, x_stride_h, y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t,
    z_stride_h, own_stride_b, own_stride_t, own_stride_h, g_stride_b, g_stride_t, g_stride_h,
    step_stride_b, step_stride_t, step_stride_h,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    DECAY: tl.constexpr, STEP: tl.constexpr, SKIP: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o from x = q, y = k, z = v, or in reverse dv from x = k, y = q, z = do: scale · Σ D (x·y) z
    over the tokens of a segment and, through the state that enters it, all before (or after) it;
    with SKIP also skip · z.

    Grid: (blocks of Z, S, B·H). One program owns [BX >= X, BZ] of a segment's running state. Reads
    x and y once a block, z and the entering state once, writes out once: bound by memory. In
    reverse, with STEP and SKIP, it reads own = v and writes its block's part of Δ's gradient and
    of skip's, one number a token.
    """
    block_z, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    end = tl.minimum(first + segment, T)
    chunks = tl.cdiv(end - first, C)
    o_c, o_x, o_z = tl.arange(0, C), tl.arange(0, BX), block_z * BZ + tl.arange(0, BZ)
    mask_x, mask_z = o_x < X, o_z < Z
    shared = (head // sharing).to(tl.int64)
    x += batch.to(tl.int64) * x_stride_b + shared * x_stride_h
    y += batch.to(tl.int64) * y_stride_b + shared * y_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    out += (batch.to(tl.int64) * T * H + head) * Z
    head_decay = head_log2_decay(g, head, DECAY)
    if DECAY == TOKEN_DECAY:
        g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    if STEP:
        step += batch.to(tl.int64) * step_stride_b + head.to(tl.int64) * step_stride_h
    if SKIP:
        skip_weight = tl.load(skip + head)
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    if REVERSE and (STEP or SKIP):
        own += batch.to(tl.int64) * own_stride_b + head.to(tl.int64) * own_stride_h
        sums = (block_z.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * T

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * X * Z + o_x[:, None] * Z + o_z[None, :]
    b_state = tl.load(p_state, mask=mask_x[:, None] & mask_z[None, :], other=0.0)

    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_cz = mask_c[:, None] & mask_z[None, :]
        b_x = load_rows(x, start, T, x_stride_t, o_c, o_x, X, X % BX == 0)
        b_y = load_rows(y, start, T, y_stride_t, o_c, o_x, X, X % BX == 0)
        b_z = load_rows(z, start, T, z_stride_t, o_c, o_z, Z, Z % BZ == 0)
        b_sum, b_document, b_from_start, b_to_end, b_through = live_decay(
            g, doc_ids, start, T, g_stride_t, head_decay, C, DECAY, PACKED, PRECISION == "ieee"
        )
        b_into = b_to_end if REVERSE else b_from_start * scale  # what of the state a token sees
        b_out_of = b_from_start * scale if REVERSE else b_to_end  # what of a token the state sees
        b_score = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION) * scale
        b_score *= pair_decay(b_sum, b_document, C, PACKED, REVERSE)
        if STEP:
            p_step = step + (start + o_c).to(tl.int64) * step_stride_t
            b_step = tl.load(p_step, mask=mask_c, other=0.0)
            if not REVERSE:
                b_score *= b_step[None, :]
                b_out_of *= b_step
        b_out = tl.dot(b_x, b_state.to(b_x.dtype), input_precision=PRECISION) * b_into[:, None]
        b_out = tl.dot(b_score.to(b_z.dtype), b_z, b_out, input_precision=PRECISION)
        if REVERSE and (STEP or SKIP):
            b_own = load_rows(own, start, T, own_stride_t, o_c, o_z, Z, Z % BZ == 0).to(tl.float32)
            if STEP:
                b_amount = tl.sum(b_own * b_out, axis=1)
                tl.store(step_gradient + sums + start + o_c, b_amount, mask=mask_c)
            if SKIP:
                b_amount = tl.sum(b_own * b_z.to(tl.float32), axis=1)
                tl.store(skip_gradient + sums + start + o_c, b_amount, mask=mask_c)
        if REVERSE and STEP:
            b_out *= b_step[:, None]
        if SKIP:
            b_out += b_z.to(tl.float32) * skip_weight
        p_out = out + start.to(tl.int64) * H * Z + o_c[:, None] * (H * Z) + o_z[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_cz)
        b_z = (b_z * b_out_of[:, None]).to(b_z.dtype)
        b_state = tl.dot(tl.trans(b_y), b_z, b_state * b_through, input_precision=PRECISION)


@Kernel
@triton.jit
def key_kernel(
    x, y, z, own, g, step, doc_ids, state, out, pair_sums, state_sums, borders, across,
    T, H, sharing, segment, scale,
    x_stride_b, x_stride_t, x_stride_h, y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t,
    z_stride_h, own_stride_b, own_stride_t, own_stride_h, g_stride_b, g_stride_t, g_stride_h,
    step_stride_b, step_stride_t, step_stride_h,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    DECAY: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's part of dq from x = do, y = v, z = k, or in reverse of dk from x = v, y = do, z = q:
    scale · Σ D (x·y) z over the tokens of a segment and, through the state that enters it, all
    before (or after) it.

    Grid: (blocks of Z, S, B·H). One program owns [BX >= X, BZ] of a segment's running state. Reads
    x and y once a block, z and the entering state once, writes out once: bound by memory. With SUMS
    it reads own (q, or in reverse k) and writes what the decay's gradient is made of: to
    `state_sums` what of Σ_Z own · out came through the state, and in reverse to `pair_sums` what a
    token's pairs in its chunk gave it as the later of the two less what they gave it as the
    earlier; one matrix gives both, so that they cancel where they must; to `borders`
    [B, chunks, H, X, Z] the state that enters each chunk, which the reverse reads for <it, the
    gradient of what leaves the chunk> · the chunk's decay, to `across` [blocks, B, chunks, H].
    """
    block_z, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    end = tl.minimum(first + segment, T)
    chunks = tl.cdiv(end - first, C)
    o_c, o_x, o_z = tl.arange(0, C), tl.arange(0, BX), block_z * BZ + tl.arange(0, BZ)
    mask_x, mask_z = o_x < X, o_z < Z
    wide_head, shared = head.to(tl.int64), (head // sharing).to(tl.int64)
    x += batch.to(tl.int64) * x_stride_b
    y += batch.to(tl.int64) * y_stride_b
    z += batch.to(tl.int64) * z_stride_b + shared * z_stride_h
    out += (batch.to(tl.int64) * T * H + head) * Z
    if DECAY == TOKEN_DECAY:
        g += batch.to(tl.int64) * g_stride_b
    if STEP:
        step += batch.to(tl.int64) * step_stride_b
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    if SUMS:
        own += batch.to(tl.int64) * own_stride_b + shared * own_stride_h
        sums = (block_z.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * T

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * X * Z + o_x[:, None] + o_z[None, :] * X
    b_state = tl.load(p_state, mask=mask_x[:, None] & mask_z[None, :], other=0.0)

    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_cz = mask_c[:, None] & mask_z[None, :]
        if SUMS:  # first: later there are too few registers
            chunk = (batch.to(tl.int64) * tl.cdiv(T, C) + start // C) * H + head
            p_border = borders + chunk * X * Z + o_x[:, None] * Z + o_z[None, :]
            if REVERSE:
                b_border = tl.load(p_border, mask=mask_x[:, None] & mask_z[None, :], other=0.0)
                amount = tl.sum(tl.sum(b_border.to(tl.float32) * b_state, axis=1), axis=0)
            else:
                b_border = b_state.to(borders.dtype.element_ty)
                tl.store(p_border, b_border, mask=mask_x[:, None] & mask_z[None, :])
        b_z = load_rows(z, start, T, z_stride_t, o_c, o_z, Z, Z % BZ == 0)
        if SUMS:
            b_own = load_rows(own, start, T, own_stride_t, o_c, o_z, Z, Z % BZ == 0)
        p_x, p_y = x + wide_head * x_stride_h, y + wide_head * y_stride_h
        b_x = load_rows(p_x, start, T, x_stride_t, o_c, o_x, X, X % BX == 0)
        b_y = load_rows(p_y, start, T, y_stride_t, o_c, o_x, X, X % BX == 0)
        head_decay = head_log2_decay(g, wide_head, DECAY)
        p_g = g
        if DECAY == TOKEN_DECAY:
            p_g = g + wide_head * g_stride_h
        b_sum, b_document, b_from_start, b_to_end, b_through = live_decay(
            p_g, doc_ids, start, T, g_stride_t, head_decay, C, DECAY, PACKED, PRECISION == "ieee"
        )
        b_into = b_to_end if REVERSE else b_from_start * scale
        b_out_of = b_from_start * scale if REVERSE else b_to_end
        if STEP:
            p_step = step + wide_head * step_stride_h + (start + o_c).to(tl.int64) * step_stride_t
            b_step = tl.load(p_step, mask=mask_c, other=0.0)
            if REVERSE:
                b_into *= b_step
            else:
                b_out_of *= b_step
        b_out = tl.zeros([C, BZ], dtype=tl.float32)
        b_out = tl.dot(b_x, b_state.to(b_x.dtype), b_out, input_precision=PRECISION)
        b_out *= b_into[:, None]
        if SUMS:
            if REVERSE:
                at = block_z.to(tl.int64) * tl.num_programs(2) * tl.cdiv(T, C)
                tl.store(across + at + chunk, amount * b_through)
            b_amount = tl.sum(b_own.to(tl.float32) * b_out, axis=1)
            tl.store(state_sums + sums + start + o_c, b_amount, mask=mask_c)
        # The state before the scores: they do not fit in registers together.
        b_weighted = (b_z.to(tl.float32) * b_out_of[:, None]).to(b_z.dtype)
        b_state = b_state * b_through
        b_state = tl.dot(tl.trans(b_y), b_weighted, b_state, input_precision=PRECISION)
        b_score = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION) * scale
        b_score *= pair_decay(b_sum, b_document, C, PACKED, REVERSE)
        if STEP:
            b_score *= b_step[:, None] if REVERSE else b_step[None, :]
        if SUMS and REVERSE:
            b_amount = tl.dot(b_own, tl.trans(b_z), input_precision=PRECISION) * b_score
            b_amount = tl.sum(b_amount, axis=0) - tl.sum(tl.trans(b_amount), axis=0)
            tl.store(pair_sums + sums + start + o_c, b_amount, mask=mask_c)
        b_out = tl.dot(b_score.to(b_z.dtype), b_z, b_out, input_precision=PRECISION)
        p_out = out + start.to(tl.int64) * H * Z + o_c[:, None] * (H * Z) + o_z[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_cz)


@Kernel
@triton.jit
def decay_gradient_kernel(
    query_state_sums, pair_sums, key_state_sums, across, dg,
    T, H, B,
    C: tl.constexpr, R: tl.constexpr, QUERY_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr,
):  # fmt: skip
    """dg_τ: what every pair of tokens s < τ <= t gives the decay between them.

    Pairs inside the chunk: the running sum of `pair_sums` from its end. With s before it: that of
    q·dq. With t behind it: the running sum of k·dk from its start. Both: `across`. No two large
    parts cancel, so that each may be rounded on its own.

    Grid: (blocks of R chunks, B·H). Reads the sums of the two walks: bound by memory.
    """
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    chunks = tl.cdiv(T, C)
    o_r = tl.program_id(0) * R + tl.arange(0, R)
    o_t = o_r[:, None] * C + tl.arange(0, C)[None, :]
    mask = o_t < T
    o_sums = tl.program_id(1).to(tl.int64) * T + o_t
    size = tl.num_programs(1).to(tl.int64) * T
    b_until, b_after = tl.zeros([R, C], dtype=tl.float32), tl.zeros([R, C], dtype=tl.float32)
    b_across = tl.zeros([R], dtype=tl.float32)
    for block in tl.static_range(QUERY_BLOCKS):
        b_until += tl.load(query_state_sums + block * size + o_sums, mask=mask, other=0.0)
    for block in tl.static_range(KEY_BLOCKS):
        b_until += tl.load(pair_sums + block * size + o_sums, mask=mask, other=0.0)
        b_after += tl.load(key_state_sums + block * size + o_sums, mask=mask, other=0.0)
        p_across = across + ((block * B + batch).to(tl.int64) * chunks + o_r) * H + head
        b_across += tl.load(p_across, mask=o_r < chunks, other=0.0)
    b_dg = tl.cumsum(b_until, axis=1, reverse=True) + tl.cumsum(b_after, axis=1) - b_after
    p_dg = dg + (batch.to(tl.int64) * T + o_t) * H + head
    tl.store(p_dg, b_dg + b_across[:, None], mask=mask)
