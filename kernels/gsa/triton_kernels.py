"""Kernels of GSA, forward and backward.

With G the running sum of g inside a chunk of C tokens, f_s = 1 - e^{g_s} what the slots take of
token s, S the slots' keys or values that enter the chunk and dS the gradient of those that leave
it, for every slot m:

    gathered by a_t of b:    (a_t · S_m) e^{G_tm} + Σ_{s<=t} (a_t · b_s) e^{G_tm - G_sm} f_sm
    spread by c_t of b:      Σ_m c_tm e^{G_tm} S_m + Σ_{s<=t} A_ts b_s
    scores of the pairs:     A_ts = Σ_m c_tm e^{G_tm - G_sm} f_sm
    gradient of b_s:         Σ_m f_sm e^{G_Cm - G_sm} dS_m + Σ_{t>=s} A_ts a_t

What q gathers of the keys goes through a softmax over the slots, whose weights w spread the values
to o. Backward, do gathers of the values the gradient of w, and that of the softmax' arguments, dl,
spreads the keys to dq. So keys and values are two sides of one computation and one set of kernels:
the chunks are prepared (`prepare_kernel`: what needs no state), a walk gathers, `score_kernel`
makes the scores, a walk spreads. dk and dv are two runs of `source_gradient_kernel`, and
`decay_gradient_kernel` ends with dg.

Inside a chunk pairs are sorted by levels, as in fla_dist.kernels.gla.triton_kernels, whose helpers
serve here too. The decays lie on the slots, which the products a_t · b_s never see.

Notation: B batch, T tokens, H heads, M slots, K and V head sizes, X one of the two, W = K + V, C
tokens a chunk, N chunks, S segments. q, k, v, g, o and gradients are [B, T, H, ·], their last axis
contiguous; what is kept of tokens and slots [B, H, T, M]; pairs [B, H, T, C], the later token
first; states [B, S, H, M, W] fp32, a side at `offset` in W; of chunks [B, H, N, M] fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.levels import (
    across,
    chunk_documents,
    first_decays,
    is_later,
    level_pairs,
    next_decays,
    program_chunk,
    summands,
)
from fla_dist.kernels.common.segments import LOG2_E, negligible


@triton.jit
def single_decays(b_g, identity, TOKENS: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """e^g of single tokens, which lie on the axis TOKENS; f = 1 - e^g, by its series where g is
    small; and g. All are in the layout of products, so that nothing is computed in two."""
    o_c = tl.arange(0, C)
    b_identity = tl.load(identity + o_c[:, None] * C + o_c[None, :])
    if TOKENS == 0:
        b_single = tl.exp2(tl.dot(b_identity, summands(b_g, EXACT), input_precision="ieee"))
    else:
        b_single = tl.exp2(tl.dot(summands(b_g, EXACT), b_identity, input_precision="ieee"))
    b_g = b_single * 0 + b_g
    b_series = -b_g * (1 + b_g * 0.5 * (1 + b_g * 0.33333333 * (1 + b_g * 0.25)))
    return b_single, tl.where(b_g > -0.0625, b_series, 1 - b_single), b_g


@triton.jit
def shared(b_state, b_y, b_z, PRECISION: tl.constexpr):
    """[M]: <state, yᵀ z>, with the state in fp32, which also becomes the difference of two such
    numbers that differ by it: what rounding the state leaves out would add up over a segment."""
    b_product = tl.dot(tl.trans(b_y), b_z, input_precision=PRECISION)
    return tl.sum(b_state * b_product, axis=1)


@Kernel
@triton.jit
def prepare_kernel(
    a, b, g, doc_ids, identity, decay_in, taken_out, chunk_decay, products, inside,
    T, H, M, X, scale,
    a_stride_b, a_stride_t, a_stride_h, b_stride_b, b_stride_t, b_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    RESET: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`decay_in` e^G and `taken_out` f e^{G_C - G}, zero where a document keeps the token from the
    chunk's start or its end; the chunk's log decay, RESET where a document starts in it; the
    `products` scale a_t · b_s of the pairs s <= t; `inside`, what a gathers in the chunk, less its
    mean over the slots: the softmax, and its gradient, are the same with any number added to all
    slots, and without the mean half precision keeps what tells them apart.

    Grid: (N·H, B). Reads a, b, g once; writes 3M + C numbers a token.
    """
    batch, chunk, head = program_chunk(H)
    start, stream = chunk * C, batch.to(tl.int64) * H + head
    o_c, o_m = tl.arange(0, C), tl.arange(0, BM)
    mask_c, mask_m = o_c < T - start, o_m < M
    mask = mask_m[:, None] & mask_c[None, :]
    a += batch.to(tl.int64) * a_stride_b + head.to(tl.int64) * a_stride_h
    b += batch.to(tl.int64) * b_stride_b + head.to(tl.int64) * b_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    a += start.to(tl.int64) * a_stride_t
    b += start.to(tl.int64) * b_stride_t
    g += start.to(tl.int64) * g_stride_t
    row = stream * T + start
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
    visible = o_c[:, None] >= o_c[None, :]
    if PACKED:
        visible = visible & (b_document[:, None] == b_document[None, :])

    b_g = tl.load(g + o_m[:, None] + o_c[None, :] * g_stride_t, mask=mask, other=0.0)
    b_product = tl.zeros([C, C], dtype=tl.float32)
    for first_x in tl.range(0, X, BX, num_stages=1):
        o_x = first_x + tl.arange(0, BX)
        mask_x = mask_c[:, None] & (o_x < X)[None, :]
        b_a = tl.load(a + o_c[:, None] * a_stride_t + o_x[None, :], mask=mask_x, other=0.0)
        b_b = tl.load(b + o_c[:, None] * b_stride_t + o_x[None, :], mask=mask_x, other=0.0)
        b_product = tl.dot(b_a, tl.trans(b_b), b_product, input_precision=PRECISION)
    b_product = tl.where(visible, b_product * scale, 0.0)
    b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_product, 0.0), axis=0)
    # Transposed before it is rounded, it enters products from registers.
    b_transposed = tl.trans(b_product)
    dtype: tl.constexpr = products.dtype.element_ty
    p_product = products + row * C + o_c[:, None] * C + o_c[None, :]
    tl.store(p_product, b_product.to(dtype), mask=mask_c[:, None])

    b_single, b_taken, b_g = single_decays(b_g, identity, 1, C, PRECISION == "ieee")
    b_in, b_out, b_block = b_single, b_taken, b_single
    b_inside = b_taken * b_own[None, :]
    for level in tl.static_range(LEVELS):
        later = is_later(o_c, level)[None, :]
        b_pairs = tl.where(level_pairs(o_c, level), b_transposed, 0.0).to(dtype)
        b_inside += b_in * tl.dot(b_out.to(dtype), b_pairs, input_precision=PRECISION)
        b_other = across(b_block, 1, level)
        b_in = tl.where(later, b_in * b_other, b_in)
        b_out = tl.where(later, b_out, b_out * b_other)
        b_block *= b_other
    b_inside -= (tl.sum(tl.where(mask_m[:, None], b_inside, 0.0), axis=0) / M)[None, :]

    o_mc = row * M + o_c[None, :] * M + o_m[:, None]
    b_total = tl.sum(b_g, axis=1)
    if PACKED:
        b_in = tl.where(b_continues[None, :], b_in, 0.0)
        b_out = tl.where(b_last[None, :], b_out, 0.0)
        b_total = tl.where(passes, b_total, RESET)
    tl.store(decay_in + o_mc, b_in.to(decay_in.dtype.element_ty), mask=mask)
    tl.store(taken_out + o_mc, b_out.to(taken_out.dtype.element_ty), mask=mask)
    tl.store(inside + o_mc, b_inside.to(inside.dtype.element_ty), mask=mask)
    tl.store(chunk_decay + (stream * tl.cdiv(T, C) + chunk) * M + o_m, b_total, mask=mask_m)


@Kernel
@triton.jit
def summarize_kernel(
    y, z, chunk_decay, state, log_decay,
    T, H, M, X, W, offset, segment, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One side of the state Σ yᵀ z that a segment's tokens leave at its end (taken_out, k or v), or
    in reverse of its gradient at the segment's start (c_in, q or do).

    Grid: (blocks of X, S, B·H). One program owns [BM >= M, BX] of a segment's state. Reads z once
    and y once a block, writes one state a segment: bound by memory. Forward: also writes the
    segment's log decays.
    """
    block, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), block * BX + tl.arange(0, BX)
    mask_m, mask_x = o_m < M, o_x < X
    y += tl.program_id(2).to(tl.int64) * T * M
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    chunk_decay += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * M

    b_state = tl.zeros([BM, BX], dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        p_y = y + start.to(tl.int64) * M + o_c[:, None] * M + o_m[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_x[None, :]
        p_decay = chunk_decay + (start // C).to(tl.int64) * M + o_m
        b_y = tl.load(p_y, mask=mask_c[:, None] & mask_m[None, :], other=0.0)
        b_z = tl.load(p_z, mask=mask_c[:, None] & mask_x[None, :], other=0.0)
        b_decay = tl.load(p_decay, mask=mask_m, other=0.0)
        b_total += b_decay
        b_state *= tl.exp2(b_decay * LOG2_E)[:, None]
        b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision=PRECISION)

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * M * W + o_m[:, None] * W + offset + o_x[None, :]
    tl.store(p_state, b_state, mask=mask_m[:, None] & mask_x[None, :])
    if not REVERSE:
        if block == 0:
            tl.store(log_decay + stretch * M + o_m, b_total, mask=mask_m)


@Kernel
@triton.jit
def gather_kernel(
    a, b, decay_in, taken_out, chunk_decay, inside, state, weights, inherited, out, out_in,
    exponents, sums,
    T, H, M, X, W, offset, segment, scale, out_scale,
    a_stride_b, a_stride_t, a_stride_h, b_stride_b, b_stride_t, b_stride_h,
    C: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr, BACKWARD: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out`: of (a, b) = (q, k) the softmax w over slots of what q gathers, with `inherited`, the
    part of its arguments that came with the state; `out_in`: e^G w.

    In the backward: of (do, v) and both `weights` w and `inherited` the gradient dl of the softmax'
    arguments, and out_scale e^G dl; `exponents`, the gradients of G_t from tokens before the chunk;
    `sums` <S, e^G wᵀ do> of each chunk, what its tokens have in <state, its gradient>.

    Grid: (S, B·H). One program owns [BM >= M, BX >= X] of a segment's running state. Reads a, b and
    3M numbers of slots a token, in the backward 5M, and writes 3M.
    """
    segment_index, batch, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    first = segment_index * segment
    chunk_count = tl.cdiv(T, C)
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), tl.arange(0, BX)
    mask_m, mask_x = o_m < M, o_x < X
    a += batch.to(tl.int64) * a_stride_b + head.to(tl.int64) * a_stride_h
    b += batch.to(tl.int64) * b_stride_b + head.to(tl.int64) * b_stride_h
    row = tl.program_id(1).to(tl.int64) * T
    chunk_row = tl.program_id(1).to(tl.int64) * chunk_count
    stretch = (batch.to(tl.int64) * tl.num_programs(0) + segment_index) * H + head
    p_state = state + stretch * M * W + o_m[:, None] * W + offset + o_x[None, :]
    b_state = tl.load(p_state, mask=mask_m[:, None] & mask_x[None, :], other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + i * C
        mask_c = o_c < T - start
        mask_cx, mask_cm = mask_c[:, None] & mask_x[None, :], mask_c[:, None] & mask_m[None, :]
        o_cm = (row + start) * M + o_c[:, None] * M + o_m[None, :]
        o_chunk = (chunk_row + start // C) * M + o_m
        p_a = a + start.to(tl.int64) * a_stride_t + o_c[:, None] * a_stride_t + o_x[None, :]
        p_b = b + start.to(tl.int64) * b_stride_t + o_c[:, None] * b_stride_t + o_x[None, :]
        b_a = tl.load(p_a, mask=mask_cx, other=0.0)
        b_b = tl.load(p_b, mask=mask_cx, other=0.0)
        b_in = tl.load(decay_in + o_cm, mask=mask_cm, other=0.0).to(tl.float32)
        b_taken = tl.load(taken_out + o_cm, mask=mask_cm, other=0.0)
        b_inside = tl.load(inside + o_cm, mask=mask_cm, other=0.0).to(tl.float32)
        b_decay = tl.load(chunk_decay + o_chunk, mask=mask_m, other=0.0)

        b_inherited = tl.dot(b_a, tl.trans(b_state.to(b_a.dtype)), input_precision=PRECISION)
        b_inherited *= b_in * scale
        b_gathered = b_inherited + b_inside
        if BACKWARD:
            b_weight = tl.load(weights + o_cm, mask=mask_cm, other=0.0).to(tl.float32)
            b_argument = tl.load(inherited + o_cm, mask=mask_cm, other=0.0).to(tl.float32)
            b_mean = tl.sum(b_weight * b_gathered, axis=1)
            b_out = b_weight * (b_gathered - b_mean[:, None])
            b_exponent = b_out * b_argument + b_weight * b_inherited
            tl.store(exponents + o_cm, b_exponent.to(exponents.dtype.element_ty), mask=mask_cm)
            b_sum = shared(b_state, (b_weight * b_in).to(b_a.dtype), b_a, PRECISION)
            tl.store(sums + o_chunk, b_sum, mask=mask_m)
        else:
            b_gathered = tl.where(mask_m[None, :], b_gathered * LOG2_E, -float("inf"))
            b_out = tl.exp2(b_gathered - tl.max(b_gathered, axis=1)[:, None])
            b_out *= (1 / tl.sum(b_out, axis=1))[:, None]
            b_argument = b_inherited.to(inherited.dtype.element_ty)
            tl.store(inherited + o_cm, b_argument, mask=mask_cm)
        b_out = b_out.to(out.dtype.element_ty)
        tl.store(out + o_cm, b_out, mask=mask_cm)
        b_out = b_out.to(tl.float32) * b_in * out_scale
        tl.store(out_in + o_cm, b_out.to(out_in.dtype.element_ty), mask=mask_cm)
        b_state *= tl.exp2(b_decay * LOG2_E)[:, None]
        b_state = tl.dot(tl.trans(b_taken), b_b, b_state, input_precision=PRECISION)


@Kernel
@triton.jit
def score_kernel(
    c, g, doc_ids, identity, scores,
    T, H, M, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of the pairs s <= t, of c = w or dl.

    Grid: (N·H, B). Reads c and g once, writes C numbers a token.
    """
    batch, chunk, head = program_chunk(H)
    start = chunk * C
    o_c, o_m = tl.arange(0, C), tl.arange(0, BM)
    mask_c = o_c < T - start
    mask = mask_c[:, None] & (o_m < M)[None, :]
    g += batch.to(tl.int64) * g_stride_b + start.to(tl.int64) * g_stride_t
    g += head.to(tl.int64) * g_stride_h
    row = (batch.to(tl.int64) * H + head) * T + start
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, _, _, _ = chunk_documents(doc_ids, start, T, C, PACKED)
    o_pair = o_c[:, None] * C + o_c[None, :]
    b_g = tl.load(g + o_c[:, None] * g_stride_t + o_m[None, :], mask=mask, other=0.0)
    b_c = tl.load(c + row * M + o_c[:, None] * M + o_m[None, :], mask=mask, other=0.0)
    b_block, b_taken, _ = single_decays(b_g, identity, 0, C, PRECISION == "ieee")
    b_c = b_block * 0 + b_c
    b_own = tl.sum(b_c * b_taken, axis=1)[:, None]
    b_score = tl.where(o_c[:, None] == o_c[None, :], b_own, 0.0)
    b_before, b_after = b_c * b_block, b_taken
    dtype: tl.constexpr = c.dtype.element_ty
    for level in tl.static_range(LEVELS):
        later = is_later(o_c, level)[:, None]
        b_side = tl.where(later, b_before, b_after)
        b_transposed = tl.trans(b_side).to(dtype)
        b_pairs = tl.dot(b_side.to(dtype), b_transposed, input_precision=PRECISION)
        b_score += tl.where(level_pairs(o_c, level), b_pairs, 0.0)
        if level < LEVELS - 1:
            b_other = across(b_block, 0, level)
            b_side *= b_other
            b_before = tl.where(later, b_side, b_before)
            b_after = tl.where(later, b_after, b_side)
            b_block *= b_other
    visible = o_c[:, None] >= o_c[None, :]
    if PACKED:
        visible = visible & (b_document[:, None] == b_document[None, :])
    b_score = tl.where(visible, b_score, 0.0).to(scores.dtype.element_ty)
    tl.store(scores + row * C + o_pair, b_score, mask=mask_c[:, None])


@Kernel
@triton.jit
def spread_kernel(
    a, c_in, z, taken_out, chunk_decay, scores, state, out, sums,
    T, H, M, X, W, offset, segment, scale,
    a_stride_b, a_stride_t, a_stride_h, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr, BACKWARD: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o from (e^G w, v), or dq from (scale e^G dl, k): c_in S + scale scores z. In
    the backward a = q, and `sums` <S, c_inᵀ q> of each chunk, by blocks of X [·, B, H, N, M].

    Grid: (blocks of X, S, B·H). One program owns [BM >= M, BX] of a segment's running state. Reads
    c_in, taken_out and the scores once a block, z (and a) once, writes out once.
    """
    block, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), block * BX + tl.arange(0, BX)
    o_pair = o_c[:, None] * C + o_c[None, :]
    mask_m, mask_x = o_m < M, o_x < X
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    c_in += tl.program_id(2).to(tl.int64) * T * M
    taken_out += tl.program_id(2).to(tl.int64) * T * M
    scores += tl.program_id(2).to(tl.int64) * T * C
    chunk_decay += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * M
    if BACKWARD:
        a += batch.to(tl.int64) * a_stride_b + head.to(tl.int64) * a_stride_h
        sums += block.to(tl.int64) * tl.num_programs(2) * tl.cdiv(T, C) * M
        sums += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * M
    out += (batch.to(tl.int64) * T * H + head) * X
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * M * W + o_m[:, None] * W + offset + o_x[None, :]
    b_state = tl.load(p_state, mask=mask_m[:, None] & mask_x[None, :], other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + i * C
        mask_c = o_c < T - start
        mask_cx, mask_cm = mask_c[:, None] & mask_x[None, :], mask_c[:, None] & mask_m[None, :]
        o_cm = start.to(tl.int64) * M + o_c[:, None] * M + o_m[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_x[None, :]
        p_score = scores + start.to(tl.int64) * C + o_pair
        p_decay = chunk_decay + (start // C).to(tl.int64) * M + o_m
        b_c = tl.load(c_in + o_cm, mask=mask_cm, other=0.0)
        b_taken = tl.load(taken_out + o_cm, mask=mask_cm, other=0.0)
        b_z = tl.load(p_z, mask=mask_cx, other=0.0)
        b_score = tl.load(p_score, mask=mask_c[:, None], other=0.0)
        b_decay = tl.load(p_decay, mask=mask_m, other=0.0)
        b_out = tl.dot(b_score, b_z, input_precision=PRECISION) * scale
        b_out = tl.dot(b_c, b_state.to(b_z.dtype), b_out, input_precision=PRECISION)
        p_out = out + start.to(tl.int64) * H * X + o_c[:, None] * (H * X) + o_x[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_cx)
        if BACKWARD:
            p_a = a + start.to(tl.int64) * a_stride_t + o_c[:, None] * a_stride_t + o_x[None, :]
            b_a = tl.load(p_a, mask=mask_cx, other=0.0)
            p_sum = sums + (start // C).to(tl.int64) * M + o_m
            tl.store(p_sum, shared(b_state, b_c, b_a, PRECISION), mask=mask_m)
        b_state *= tl.exp2(b_decay * LOG2_E)[:, None]
        b_state = tl.dot(tl.trans(b_taken), b_z, b_state, input_precision=PRECISION)


@Kernel
@triton.jit
def source_gradient_kernel(
    a, c_in, z, taken_out, chunk_decay, scores, leaving_gradient, entering, final, sums, dz,
    taken_gradient, carries,
    T, H, M, X, W, offset, segment, scale,
    a_stride_b, a_stride_t, a_stride_h, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk from (a, c_in, z) = (q, scale e^G dl, k), or dv from (do, e^G w, v): taken_out dS +
    scale scoresᵀ a.

    For dg, also `taken_gradient` dS z, of keys and values together (the second run adds to what the
    first left), and `carries`, what pairs with one token before a chunk and one after it give the
    decays in it: <state, its gradient> at the chunk's end, less what the chunk's own tokens have in
    it, and nothing where the chunk lets next to nothing through. `sums` are those of the
    forward walks.

    Grid: (S, B·H). One program owns [BM >= M, BX >= X] of the gradient of a segment's running
    state. Reads a, z, c_in, taken_out and the scores once, writes dz and M numbers a token.
    """
    segment_index, batch, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), tl.arange(0, BX)
    o_transposed = o_c[None, :] * C + o_c[:, None]
    mask_m, mask_x = o_m < M, o_x < X
    mask_mx = mask_m[:, None] & mask_x[None, :]
    a += batch.to(tl.int64) * a_stride_b + head.to(tl.int64) * a_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    c_in += tl.program_id(1).to(tl.int64) * T * M
    taken_out += tl.program_id(1).to(tl.int64) * T * M
    taken_gradient += tl.program_id(1).to(tl.int64) * T * M
    scores += tl.program_id(1).to(tl.int64) * T * C
    dz += (batch.to(tl.int64) * T * H + head) * X
    chunk_decay += tl.program_id(1).to(tl.int64) * tl.cdiv(T, C) * M
    sums += tl.program_id(1).to(tl.int64) * tl.cdiv(T, C) * M
    carries += tl.program_id(1).to(tl.int64) * tl.cdiv(T, C) * M

    stretch = (batch.to(tl.int64) * tl.num_programs(0) + segment_index) * H + head
    o_mx = o_m[:, None] * W + offset + o_x[None, :]
    b_state = tl.load(leaving_gradient + stretch * M * W + o_mx, mask=mask_mx, other=0.0)
    p_leaving = entering + (stretch + H) * M * W
    if segment_index == tl.num_programs(0) - 1:
        p_leaving = final + tl.program_id(1).to(tl.int64) * M * W
    b_carry = tl.sum(b_state * tl.load(p_leaving + o_mx, mask=mask_mx, other=0.0), axis=1)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i) * C
        mask_c = o_c < T - start
        mask_cx, mask_cm = mask_c[:, None] & mask_x[None, :], mask_c[:, None] & mask_m[None, :]
        o_cm = start.to(tl.int64) * M + o_c[:, None] * M + o_m[None, :]
        o_chunk = (start // C).to(tl.int64) * M + o_m
        p_a = a + start.to(tl.int64) * a_stride_t + o_c[:, None] * a_stride_t + o_x[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_x[None, :]
        p_score = scores + start.to(tl.int64) * C + o_transposed
        b_a = tl.load(p_a, mask=mask_cx, other=0.0)
        b_z = tl.load(p_z, mask=mask_cx, other=0.0)
        b_c = tl.load(c_in + o_cm, mask=mask_cm, other=0.0)
        b_taken = tl.load(taken_out + o_cm, mask=mask_cm, other=0.0)
        b_score = tl.load(p_score, mask=mask_c[None, :], other=0.0)
        b_through = tl.exp2(tl.load(chunk_decay + o_chunk, mask=mask_m, other=0.0) * LOG2_E)

        b_half = b_state.to(b_z.dtype)
        b_of_taken = tl.dot(b_z, tl.trans(b_half), input_precision=PRECISION)
        if ADD:
            b_of_taken += tl.load(taken_gradient + o_cm, mask=mask_cm, other=0.0)
        b_of_taken = b_of_taken.to(taken_gradient.dtype.element_ty)
        tl.store(taken_gradient + o_cm, b_of_taken, mask=mask_cm)
        b_dz = tl.dot(b_score, b_a, input_precision=PRECISION) * scale
        b_dz = tl.dot(b_taken, b_half, b_dz, input_precision=PRECISION)
        p_dz = dz + start.to(tl.int64) * H * X + o_c[:, None] * (H * X) + o_x[None, :]
        tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=mask_cx)

        b_across = b_carry - shared(b_state, b_taken, b_z, PRECISION)
        b_across = tl.where(b_through > negligible(PRECISION == "ieee"), b_across, 0.0)
        tl.store(carries + o_chunk, b_across, mask=mask_m)
        b_carry = b_across + tl.load(sums + o_chunk, mask=mask_m, other=0.0)
        b_state *= b_through[:, None]
        b_state = tl.dot(tl.trans(b_c), b_a, b_state, input_precision=PRECISION)


@triton.jit
def mirrored(p_pairs, b_identity, o_c, mask_c):
    """A chunk's products of pairs and, in place of the zeros above the diagonal, their mirror
    image; multiplied by the identity, so that transposed they enter products from registers."""
    b_x = tl.load(p_pairs, mask=mask_c[:, None], other=0.0)
    b_lower = tl.dot(b_x, b_identity, input_precision="ieee")
    b_upper = tl.dot(tl.trans(b_x), b_identity, input_precision="ieee")
    return tl.where(o_c[:, None] >= o_c[None, :], b_lower, b_upper)


@Kernel
@triton.jit
def decay_gradient_kernel(
    g, weights, gradients, exponents, taken_gradient, carries, key_products, value_products,
    doc_ids, identity, pair_identity, gradient_spans, dg,
    T, H, M, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dg: the gradients of the exponents over each token, of every level's spans and of those from
    the chunk's start and to its end, the carries over the whole chunk, and -e^g times the gradient
    of f.

    Grid: (N·H·BLOCKS, B). Reads g, four arrays of its size and two of pairs; writes dg.
    """
    batch, chunk, head_block = program_chunk(H * BLOCKS)
    head, block = head_block // BLOCKS, head_block % BLOCKS
    start, chunks = chunk * C, tl.cdiv(T, C)
    stream = batch.to(tl.int64) * H + head
    o_c, o_m = tl.arange(0, C), block * BM + tl.arange(0, BM)
    mask_c, mask_m = o_c < T - start, o_m < M
    mask = mask_m[:, None] & mask_c[None, :]
    g += batch.to(tl.int64) * g_stride_b + start.to(tl.int64) * g_stride_t
    g += head.to(tl.int64) * g_stride_h
    row = stream * T + start
    dg += ((batch.to(tl.int64) * T + start) * H + head) * M
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    _, _, b_last, _ = chunk_documents(doc_ids, start, T, C, PACKED)

    # Transposed, [M, C]: what one product returns enters the next as it is.
    o_mc = row * M + o_m[:, None] + o_c[None, :] * M
    o_pair = o_c[:, None] * C + o_c[None, :]
    b_g = tl.load(g + o_m[:, None] + o_c[None, :] * g_stride_t, mask=mask, other=0.0)
    b_weight = tl.load(weights + o_mc, mask=mask, other=0.0).to(tl.float32)
    b_gradient = tl.load(gradients + o_mc, mask=mask, other=0.0).to(tl.float32)
    b_exponent = tl.load(exponents + o_mc, mask=mask, other=0.0)
    b_of_taken = tl.load(taken_gradient + o_mc, mask=mask, other=0.0).to(tl.float32)
    key_products += row * C
    value_products += row * C
    b_identity = tl.load(pair_identity + o_pair)
    b_of_keys = mirrored(key_products + o_pair, b_identity, o_c, mask_c)
    b_of_values = mirrored(value_products + o_pair, b_identity, o_c, mask_c)
    o_own = o_c * (C + 1)
    b_own_keys = tl.load(key_products + o_own, mask=mask_c, other=0.0).to(tl.float32)
    b_own_values = tl.load(value_products + o_own, mask=mask_c, other=0.0).to(tl.float32)
    dtype: tl.constexpr = key_products.dtype.element_ty

    b_single, b_taken, b_g = single_decays(b_g, identity, 1, C, PRECISION == "ieee")
    b_before, b_after, b_block = first_decays(b_single, False)
    b_dg = tl.zeros(b_g.shape, dtype=tl.float32)
    b_of_pairs = b_gradient * b_own_keys[None, :] + b_weight * b_own_values[None, :]
    for level in tl.static_range(LEVELS):
        b_gradient_span = tl.load(gradient_spans + level * C * C + o_pair)
        later, pairs = is_later(o_c, level)[None, :], level_pairs(o_c, level)
        b_decay = tl.where(later, b_before, b_after)
        b_level = tl.trans(tl.where(pairs, b_of_keys, 0.0)).to(dtype)
        b_side = tl.where(later, b_gradient, b_taken) * b_decay
        b_keys = tl.dot(b_side.to(dtype), b_level, input_precision=PRECISION)
        b_change = b_side * b_keys
        b_level = tl.trans(tl.where(pairs, b_of_values, 0.0)).to(dtype)
        b_side = tl.where(later, b_weight, b_taken) * b_decay
        b_values = tl.dot(b_side.to(dtype), b_level, input_precision=PRECISION)
        b_change = (b_change + b_side * b_values).to(b_gradient_span.dtype)
        b_earlier = b_of_pairs + b_decay * (b_keys + b_values)
        b_of_pairs = tl.where(later, b_of_pairs, b_earlier)
        b_dg = tl.dot(b_change, b_gradient_span, b_dg, input_precision="ieee")
        b_before, b_after, b_block = next_decays(
            b_before, b_after, b_block, b_decay, later, 1, level
        )
    b_of_taken *= b_after
    if PACKED:
        b_of_taken = tl.where(b_last[None, :], b_of_taken, 0.0)
    b_span_before = tl.load(gradient_spans + LEVELS * C * C + o_pair)
    b_span_after = tl.load(gradient_spans + (LEVELS + 1) * C * C + o_pair)
    b_dg = tl.dot(b_exponent.to(b_span_before.dtype), b_span_before, b_dg, input_precision="ieee")
    b_change = (b_taken * b_of_taken).to(b_span_after.dtype)
    b_dg = tl.dot(b_change, b_span_after, b_dg, input_precision="ieee")
    b_of_taken += b_of_pairs
    p_carry = carries + (stream * chunks + chunk) * M
    side = tl.num_programs(1).to(tl.int64) * H * chunks * M
    b_carry = tl.load(p_carry + o_m, mask=mask_m, other=0.0)
    b_carry += tl.load(p_carry + side + o_m, mask=mask_m, other=0.0)
    b_dg += b_carry[:, None] - (1 - b_taken) * b_of_taken
    p_dg = dg + o_m[:, None] + o_c[None, :] * (H * M)
    tl.store(p_dg, b_dg.to(dg.dtype.element_ty), mask=mask)
