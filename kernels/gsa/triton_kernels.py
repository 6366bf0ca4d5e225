"""Kernels of GSA, forward and backward.

With G the running sum of g inside a chunk of C tokens, f_s = 1 - e^{g_s} what token s leaves in the
slots, S_K and S_V the slots' keys and values that enter the chunk, dS the gradient of those that
leave it, and for every slot m

    gathered by token t of (a, b):   (S a_t)_m e^{G_tm} + Σ_{s<=t} (a_t · b_s) e^{G_tm - G_sm} f_sm
    spread by weights c of (b):      Σ_m c_tm e^{G_tm} S_m + Σ_{s<=t} (Σ_m c_tm e^{G_tm - G_sm} f_sm) b_s

the scores of the slots are gathered of (q, k) and their softmax w spread of v is o; in the backward
dw is gathered of (do, v), and the gradient dl of the scores spread of k is dq. So keys and values
are two sides of one computation: `gather_kernel` serves both directions, `spread_kernel` o and dq,
`source_gradient_kernel` dk and dv, `decay_gradient_kernel` dg.

Inside a chunk pairs are sorted by levels, as in fla_dist.kernels.gla.triton_kernels, whose helpers
serve here too; the decays lie on the slots, which the products of a_t and b_s never see.

Notation: B batch, T tokens, H heads, M slots, K and V head sizes, X one of the two and W = K + V, C
tokens a chunk, N chunks, S segments. q, k, v, g, o and gradients are [B, T, H, ·], their last axis
contiguous; what is kept of tokens and slots [B, H, T, M]; pairs [B, H, T, C], the later token
first; states [B, S, H, M, W] fp32, a side at `offset` in W; of chunks and slots [B, H, N, M] fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.segments import LOG2_E, negligible
from fla_dist.kernels.gla.triton_kernels import chunk_documents, is_later, level_pairs, summands


@triton.jit
def taken(b_g):
    """1 - e^g, by its series where g is small."""
    b_g = b_g.to(tl.float32)
    b_series = 1 + b_g / 4 * (1 + b_g / 5 * (1 + b_g / 6 * (1 + b_g / 7)))
    b_series = -b_g * (1 + b_g / 2 * (1 + b_g / 3 * b_series))
    return tl.where(b_g > -0.25, b_series, 1 - tl.exp2(b_g * LOG2_E))


@triton.jit
def through(b_g, passes):
    """[M]: what a chunk lets through of the state that enters it; nothing unless it `passes`."""
    b_total = tl.sum(b_g.to(tl.float32), axis=0) * LOG2_E
    return tl.where(passes, tl.exp2(b_total), 0.0)


@triton.jit
def span_decays(spans, index, b_summands, C: tl.constexpr):
    """[C, M]: the decays over a span of each token: to its border of the level; from the chunk's
    start (index LEVELS); to its end (LEVELS + 1)."""
    o_c = tl.arange(0, C)
    b_span = tl.load(spans + index * C * C + o_c[:, None] * C + o_c[None, :])
    return tl.exp2(tl.dot(b_span, b_summands, input_precision="ieee"))


@triton.jit
def summarize_kernel(
    c, z, g, doc_ids, spans, state, log_decay,
    T, H, M, X, W, offset, segment, scale,
    z_stride_b, z_stride_t, z_stride_h, g_stride_b, g_stride_t, g_stride_h,
    RESET: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment's tokens add to one side of the state that leaves it, of z = k or v; in
    reverse what weights c of (z = q or do) give the gradient of the state that enters it.

    Grid: (blocks of X, S, B·H). One program owns [BM >= M, BX] of a segment's state. Reads z once,
    g and c once a block, writes one state a segment: bound by memory. Forward: also writes the
    segment's log decays.
    """
    block, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), block * BX + tl.arange(0, BX)
    mask_m, mask_x = o_m < M, o_x < X
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    if REVERSE:
        c += tl.program_id(2).to(tl.int64) * T * M
    if PACKED:
        doc_ids += batch.to(tl.int64) * T

    b_state = tl.zeros([BM, BX], dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_cm = mask_c[:, None] & mask_m[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_x[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_m[None, :]
        b_z = tl.load(p_z, mask=mask_c[:, None] & mask_x[None, :], other=0.0)
        b_g = tl.load(p_g, mask=mask_cm, other=0.0)
        _, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        b_summands = summands(b_g, PRECISION == "ieee")
        if REVERSE:
            p_c = c + start.to(tl.int64) * M + o_c[:, None] * M + o_m[None, :]
            b_c = tl.load(p_c, mask=mask_cm, other=0.0).to(tl.float32) * scale
            b_y = b_c * span_decays(spans, LEVELS, b_summands, C)
            if PACKED:
                b_y = tl.where(b_continues[:, None], b_y, 0.0)
        else:
            b_y = taken(b_g) * span_decays(spans, LEVELS + 1, b_summands, C)
            if PACKED:
                b_y = tl.where(b_last[:, None], b_y, 0.0)
            b_sum = tl.sum(b_g.to(tl.float32), axis=0)
            b_total += tl.where(passes, b_sum, RESET)
        b_state *= through(b_g, passes)[:, None]
        b_state = tl.dot(tl.trans(b_y.to(b_z.dtype)), b_z, b_state, input_precision=PRECISION)

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * M * W + o_m[:, None] * W + offset + o_x[None, :]
    tl.store(p_state, b_state, mask=mask_m[:, None] & mask_x[None, :])
    if not REVERSE:
        if block == 0:
            tl.store(log_decay + stretch * M + o_m, b_total, mask=mask_m)


@triton.jit
def gather_kernel(
    a, b, g, doc_ids, spans, state, weights, inherited, gradients, exponents, sums, products,
    scores,
    T, H, M, X, W, offset, segment, scale,
    a_stride_b, a_stride_t, a_stride_h, b_stride_b, b_stride_t, b_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of (a, b) = (q, k): the softmax `weights` over slots, `inherited`, the part of its arguments
    that came with the state, and `scores` Σ_m w_tm e^{G_tm - G_sm} f_sm of the pairs.

    In the backward, of (do, v): the `gradients` dl of the softmax' arguments and the scores with dl
    in place of w; `exponents`, the gradients of G_t from tokens before the chunk, and `sums`, their
    sums over a chunk, of keys and of values, [2, B, H, N, M].

    Grid: (S, B·H). One program owns [BM >= M, BX >= X] of a segment's running state. Reads a, b and
    g once; writes M or 2M numbers a token and 2C of pairs: `products` scale a_t·b_s and `scores`.
    """
    segment_index, batch, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), tl.arange(0, BX)
    o_pair = o_c[:, None] * C + o_c[None, :]
    mask_m, mask_x = o_m < M, o_x < X
    a += batch.to(tl.int64) * a_stride_b + head.to(tl.int64) * a_stride_h
    b += batch.to(tl.int64) * b_stride_b + head.to(tl.int64) * b_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    row = tl.program_id(1).to(tl.int64) * T
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    stretch = (batch.to(tl.int64) * tl.num_programs(0) + segment_index) * H + head
    p_state = state + stretch * M * W + o_m[:, None] * W + offset + o_x[None, :]
    b_state = tl.load(p_state, mask=mask_m[:, None] & mask_x[None, :], other=0.0)

    for i in range(chunks):
        start = first + i * C
        mask_c = o_c < T - start
        mask_cx, mask_cm = mask_c[:, None] & mask_x[None, :], mask_c[:, None] & mask_m[None, :]
        o_cm = (row + start) * M + o_c[:, None] * M + o_m[None, :]
        p_a = a + start.to(tl.int64) * a_stride_t + o_c[:, None] * a_stride_t + o_x[None, :]
        p_b = b + start.to(tl.int64) * b_stride_t + o_c[:, None] * b_stride_t + o_x[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_m[None, :]
        b_a = tl.load(p_a, mask=mask_cx, other=0.0)
        b_b = tl.load(p_b, mask=mask_cx, other=0.0)
        b_g = tl.load(p_g, mask=mask_cm, other=0.0)
        b_document, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        visible = o_c[:, None] >= o_c[None, :]
        if PACKED:
            visible = visible & (b_document[:, None] == b_document[None, :])
        b_summands, b_taken = summands(b_g, PRECISION == "ieee"), taken(b_g)

        b_product = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION) * scale
        b_product = tl.where(visible, b_product, 0.0).to(b_a.dtype)
        tl.store(products + (row + start) * C + o_pair, b_product, mask=mask_c[:, None])
        b_own = tl.where(o_c[:, None] == o_c[None, :], b_product, 0.0)
        b_inside = tl.dot(b_own, b_taken.to(b_a.dtype), input_precision=PRECISION)
        for level in tl.static_range(LEVELS):
            b_decay = span_decays(spans, level, b_summands, C)
            b_pairs = tl.where(level_pairs(o_c, level), b_product, 0.0)
            b_level = (b_taken * b_decay).to(b_a.dtype)
            b_inside += b_decay * tl.dot(b_pairs, b_level, input_precision=PRECISION)
        b_inherited = tl.dot(b_a, tl.trans(b_state.to(b_a.dtype)), input_precision=PRECISION)
        b_inherited *= span_decays(spans, LEVELS, b_summands, C) * scale
        if PACKED:
            b_inherited = tl.where(b_continues[:, None], b_inherited, 0.0)
        b_gathered = b_inside + b_inherited

        if BACKWARD:
            b_weight = tl.load(weights + o_cm, mask=mask_cm, other=0.0).to(tl.float32)
            b_argument = tl.load(inherited + o_cm, mask=mask_cm, other=0.0).to(tl.float32)
            b_mean = tl.sum(b_weight * b_gathered, axis=1)
            b_c = b_weight * (b_gathered - b_mean[:, None])
            b_of_keys, b_of_values = b_c * b_argument, b_weight * b_inherited
            b_exponent = (b_of_keys + b_of_values).to(exponents.dtype.element_ty)
            tl.store(gradients + o_cm, b_c.to(gradients.dtype.element_ty), mask=mask_cm)
            tl.store(exponents + o_cm, b_exponent, mask=mask_cm)
            chunk_count = tl.cdiv(T, C)
            p_sums = sums + (tl.program_id(1).to(tl.int64) * chunk_count + start // C) * M + o_m
            of_side = tl.num_programs(1).to(tl.int64) * chunk_count * M
            tl.store(p_sums, tl.sum(b_of_keys, axis=0), mask=mask_m)
            tl.store(p_sums + of_side, tl.sum(b_of_values, axis=0), mask=mask_m)
        else:
            b_argument = tl.where(mask_m[None, :], b_gathered * LOG2_E, -float("inf"))
            b_c = tl.exp2(b_argument - tl.max(b_argument, axis=1)[:, None])
            b_c /= tl.sum(b_c, axis=1)[:, None]
            b_rounded = b_inherited.to(inherited.dtype.element_ty)
            tl.store(weights + o_cm, b_c.to(weights.dtype.element_ty), mask=mask_cm)
            tl.store(inherited + o_cm, b_rounded, mask=mask_cm)

        b_score = tl.sum(b_c * b_taken, axis=1)[:, None]
        b_score = tl.where(o_c[:, None] == o_c[None, :], b_score, 0.0)
        for level in tl.static_range(LEVELS):
            b_decay = span_decays(spans, level, b_summands, C)
            b_side = tl.where(is_later(o_c, level)[:, None], b_c, b_taken) * b_decay
            b_side = b_side.to(b_a.dtype)
            b_pairs = tl.dot(b_side, tl.trans(b_side), input_precision=PRECISION)
            b_score += tl.where(level_pairs(o_c, level), b_pairs, 0.0)
        b_score = tl.where(visible, b_score, 0.0).to(scores.dtype.element_ty)
        tl.store(scores + (row + start) * C + o_pair, b_score, mask=mask_c[:, None])

        b_left = b_taken * span_decays(spans, LEVELS + 1, b_summands, C)
        if PACKED:
            b_left = tl.where(b_last[:, None], b_left, 0.0)
        b_state *= through(b_g, passes)[:, None]
        b_state = tl.dot(tl.trans(b_left.to(b_b.dtype)), b_b, b_state, input_precision=PRECISION)


@triton.jit
def spread_kernel(
    c, z, g, doc_ids, spans, scores, state, out,
    T, H, M, X, W, offset, segment, scale,
    z_stride_b, z_stride_t, z_stride_h, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o from (c, z) = (w, v), or dq from (dl, k): scale (Σ_m c_m e^{G_m} S_m + scores z).

    Grid: (blocks of X, S, B·H). One program owns [BM >= M, BX] of a segment's running state. Reads
    c, g and the scores once a block, z once, writes out once.
    """
    block, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_m, o_x = tl.arange(0, C), tl.arange(0, BM), block * BX + tl.arange(0, BX)
    o_pair = o_c[:, None] * C + o_c[None, :]
    mask_m, mask_x = o_m < M, o_x < X
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    c += tl.program_id(2).to(tl.int64) * T * M
    scores += tl.program_id(2).to(tl.int64) * T * C
    out += (batch.to(tl.int64) * T * H + head) * X
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * M * W + o_m[:, None] * W + offset + o_x[None, :]
    b_state = tl.load(p_state, mask=mask_m[:, None] & mask_x[None, :], other=0.0)

    for i in range(chunks):
        start = first + i * C
        mask_c = o_c < T - start
        mask_cx, mask_cm = mask_c[:, None] & mask_x[None, :], mask_c[:, None] & mask_m[None, :]
        p_c = c + start.to(tl.int64) * M + o_c[:, None] * M + o_m[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_x[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_m[None, :]
        p_score = scores + start.to(tl.int64) * C + o_pair
        b_c = tl.load(p_c, mask=mask_cm, other=0.0).to(tl.float32)
        b_z = tl.load(p_z, mask=mask_cx, other=0.0)
        b_g = tl.load(p_g, mask=mask_cm, other=0.0)
        b_score = tl.load(p_score, mask=mask_c[:, None], other=0.0)
        _, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_c *= span_decays(spans, LEVELS, b_summands, C)
        b_left = taken(b_g) * span_decays(spans, LEVELS + 1, b_summands, C)
        if PACKED:
            b_c = tl.where(b_continues[:, None], b_c, 0.0)
            b_left = tl.where(b_last[:, None], b_left, 0.0)
        b_out = tl.dot(b_c.to(b_z.dtype), b_state.to(b_z.dtype), input_precision=PRECISION)
        b_out = tl.dot(b_score, b_z, b_out, input_precision=PRECISION) * scale
        p_out = out + start.to(tl.int64) * H * X + o_c[:, None] * (H * X) + o_x[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_cx)
        b_state *= through(b_g, passes)[:, None]
        b_state = tl.dot(tl.trans(b_left.to(b_z.dtype)), b_z, b_state, input_precision=PRECISION)


@triton.jit
def source_gradient_kernel(
    a, c, z, g, doc_ids, spans, scores, leaving_gradient, entering, final, sums, dz, taken_gradient,
    carries,
    T, H, M, X, W, offset, segment, scale,
    a_stride_b, a_stride_t, a_stride_h, z_stride_b, z_stride_t, z_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk from (a, c, z) = (q, dl, k), or dv from (do, w, v): f e^{G_C - G} dS + scale scoresᵀ a.

    For dg, also `taken_gradient`, the gradient of f from tokens after the chunk, and `carries`
    [B, H, N, M], what pairs with one token before a chunk and one after it give the decays in it:
    <state, its gradient> at the chunk's end, less what the chunk's own tokens have in it, and
    nothing where the chunk lets next to nothing through. `sums` are those that `gather_kernel`
    wrote.

    Grid: (S, B·H). One program owns [BM >= M, BX >= X] of the gradient of a segment's running
    state. Reads a, z, c, g and the scores once, writes dz and M numbers a token.
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
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    c += tl.program_id(1).to(tl.int64) * T * M
    taken_gradient += tl.program_id(1).to(tl.int64) * T * M
    scores += tl.program_id(1).to(tl.int64) * T * C
    dz += (batch.to(tl.int64) * T * H + head) * X
    sums += tl.program_id(1).to(tl.int64) * tl.cdiv(T, C) * M
    carries += tl.program_id(1).to(tl.int64) * tl.cdiv(T, C) * M
    if PACKED:
        doc_ids += batch.to(tl.int64) * T

    stretch = (batch.to(tl.int64) * tl.num_programs(0) + segment_index) * H + head
    o_mx = o_m[:, None] * W + offset + o_x[None, :]
    b_state = tl.load(leaving_gradient + stretch * M * W + o_mx, mask=mask_mx, other=0.0)
    p_leaving = entering + (stretch + H) * M * W
    if segment_index == tl.num_programs(0) - 1:
        p_leaving = final + tl.program_id(1).to(tl.int64) * M * W
    b_carry = tl.sum(b_state * tl.load(p_leaving + o_mx, mask=mask_mx, other=0.0), axis=1)

    for i in range(chunks):
        start = first + (chunks - 1 - i) * C
        mask_c = o_c < T - start
        mask_cx, mask_cm = mask_c[:, None] & mask_x[None, :], mask_c[:, None] & mask_m[None, :]
        o_cm = start.to(tl.int64) * M + o_c[:, None] * M + o_m[None, :]
        o_chunk = (start // C).to(tl.int64) * M + o_m
        p_a = a + start.to(tl.int64) * a_stride_t + o_c[:, None] * a_stride_t + o_x[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_x[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_m[None, :]
        p_score = scores + start.to(tl.int64) * C + o_transposed
        b_a = tl.load(p_a, mask=mask_cx, other=0.0)
        b_z = tl.load(p_z, mask=mask_cx, other=0.0)
        b_g = tl.load(p_g, mask=mask_cm, other=0.0)
        b_c = tl.load(c + o_cm, mask=mask_cm, other=0.0).to(tl.float32) * scale
        b_score = tl.load(p_score, mask=mask_c[None, :], other=0.0)
        _, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        b_summands, b_taken = summands(b_g, PRECISION == "ieee"), taken(b_g)
        b_after = span_decays(spans, LEVELS + 1, b_summands, C)
        b_c *= span_decays(spans, LEVELS, b_summands, C)
        if PACKED:
            b_c = tl.where(b_continues[:, None], b_c, 0.0)
            b_after = tl.where(b_last[:, None], b_after, 0.0)

        b_half = b_state.to(b_z.dtype)
        b_of_taken = b_after * tl.dot(b_z, tl.trans(b_half), input_precision=PRECISION)
        tl.store(
            taken_gradient + o_cm, b_of_taken.to(taken_gradient.dtype.element_ty), mask=mask_cm
        )
        b_dz = tl.dot(b_score, b_a, input_precision=PRECISION) * scale
        b_dz = tl.dot((b_taken * b_after).to(b_z.dtype), b_half, b_dz, input_precision=PRECISION)
        p_dz = dz + start.to(tl.int64) * H * X + o_c[:, None] * (H * X) + o_x[None, :]
        tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=mask_cx)

        b_through = through(b_g, passes)
        b_across = b_carry - tl.sum(b_taken * b_of_taken, axis=0)
        b_across = tl.where(b_through > negligible(PRECISION == "ieee"), b_across, 0.0)
        tl.store(carries + o_chunk, b_across, mask=mask_m)
        b_carry = b_across + tl.load(sums + o_chunk, mask=mask_m, other=0.0)
        b_state *= b_through[:, None]
        b_state = tl.dot(tl.trans(b_c.to(b_a.dtype)), b_a, b_state, input_precision=PRECISION)


@triton.jit
def decay_gradient_kernel(
    g, weights, gradients, exponents, taken_gradient, carries, key_products, value_products,
    spans, gradient_spans, dg,
    T, H, M, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dg: the gradients of the exponents over each token, of every level's spans and of those from
    the chunk's start and to its end, the carries over the whole chunk, and -e^g times the gradient
    of f.

    Grid: (N, blocks of M, B·H). Reads g and four arrays of its size, two of pairs; writes dg.
    """
    start, block = tl.program_id(0) * C, tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    o_c, o_m = tl.arange(0, C), block * BM + tl.arange(0, BM)
    mask_c, mask_m = o_c < T - start, o_m < M
    mask = mask_m[:, None] & mask_c[None, :]
    g += batch.to(tl.int64) * g_stride_b + start.to(tl.int64) * g_stride_t
    g += head.to(tl.int64) * g_stride_h
    row = tl.program_id(2).to(tl.int64) * T + start
    side = tl.num_programs(2).to(tl.int64)
    dg += ((batch.to(tl.int64) * T + start) * H + head) * M

    # Transposed, [M, C]: what one product returns enters the next as it is.
    o_mc = row * M + o_m[:, None] + o_c[None, :] * M
    o_pair = o_c[:, None] * C + o_c[None, :]
    o_transposed = o_c[None, :] * C + o_c[:, None]
    b_g = tl.load(g + o_m[:, None] + o_c[None, :] * g_stride_t, mask=mask, other=0.0)
    b_weight = tl.load(weights + o_mc, mask=mask, other=0.0).to(tl.float32)
    b_gradient = tl.load(gradients + o_mc, mask=mask, other=0.0).to(tl.float32)
    b_exponent = tl.load(exponents + o_mc, mask=mask, other=0.0)
    b_of_taken = tl.load(taken_gradient + o_mc, mask=mask, other=0.0).to(tl.float32)
    b_of_taken += tl.load(taken_gradient + side * T * M + o_mc, mask=mask, other=0.0)
    key_products += row * C
    value_products += row * C
    mask_pair, mask_transposed = mask_c[:, None], mask_c[None, :]
    b_of_keys = tl.load(key_products + o_pair, mask=mask_pair, other=0.0)
    b_of_keys_t = tl.load(key_products + o_transposed, mask=mask_transposed, other=0.0)
    b_of_values = tl.load(value_products + o_pair, mask=mask_pair, other=0.0)
    b_of_values_t = tl.load(value_products + o_transposed, mask=mask_transposed, other=0.0)
    later_row = o_c[:, None] > o_c[None, :]
    b_of_keys = tl.where(later_row, b_of_keys, b_of_keys_t)
    b_of_values = tl.where(later_row, b_of_values, b_of_values_t)
    diagonal = o_c[:, None] == o_c[None, :]

    b_summands, b_taken = summands(b_g, PRECISION == "ieee"), taken(b_g)
    b_before = tl.load(gradient_spans + LEVELS * C * C + o_pair)
    b_after = tl.load(gradient_spans + (LEVELS + 1) * C * C + o_pair)
    b_dg = tl.dot(b_exponent.to(b_before.dtype), b_before, input_precision="ieee")
    b_change = (b_taken * b_of_taken).to(b_after.dtype)
    b_dg = tl.dot(b_change, b_after, b_dg, input_precision="ieee")
    b_own_keys = tl.sum(tl.where(diagonal, b_of_keys.to(tl.float32), 0.0), axis=0)
    b_own_values = tl.sum(tl.where(diagonal, b_of_values.to(tl.float32), 0.0), axis=0)
    b_of_taken += b_gradient * b_own_keys[None, :] + b_weight * b_own_values[None, :]
    for level in tl.static_range(LEVELS):
        b_span = tl.load(spans + level * C * C + o_transposed)
        b_gradient_span = tl.load(gradient_spans + level * C * C + o_pair)
        later, pairs = is_later(o_c, level)[None, :], level_pairs(o_c, level)
        b_decay = tl.exp2(tl.dot(b_summands, b_span, input_precision="ieee"))
        b_side = (tl.where(later, b_gradient, b_taken) * b_decay).to(b_of_keys.dtype)
        b_pairs = tl.where(pairs, b_of_keys, 0.0).to(b_of_keys.dtype)
        b_keys = tl.dot(b_side, b_pairs, input_precision=PRECISION) * b_decay
        b_side = (tl.where(later, b_weight, b_taken) * b_decay).to(b_of_values.dtype)
        b_pairs = tl.where(pairs, b_of_values, 0.0).to(b_of_values.dtype)
        b_values = tl.dot(b_side, b_pairs, input_precision=PRECISION) * b_decay
        b_of_earlier = b_keys + b_values
        b_of_taken += tl.where(later, 0.0, b_of_earlier)
        b_change = tl.where(
            later, b_gradient * b_keys + b_weight * b_values, b_taken * b_of_earlier
        )
        b_change = b_change.to(b_gradient_span.dtype)
        b_dg = tl.dot(b_change, b_gradient_span, b_dg, input_precision="ieee")
    p_carry = carries + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * M
    b_carry = tl.load(p_carry + o_m, mask=mask_m, other=0.0)
    b_carry += tl.load(p_carry + side * tl.num_programs(0) * M + o_m, mask=mask_m, other=0.0)
    b_dg += b_carry[:, None] - (1 - b_taken) * b_of_taken
    p_dg = dg + o_m[:, None] + o_c[None, :] * (H * M)
    tl.store(p_dg, b_dg.to(dg.dtype.element_ty), mask=mask)
