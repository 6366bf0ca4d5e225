"""Kernels of GLA, forward and backward.

Between chunks, with G the running sum of g inside a chunk and S the state that enters it (dS the
gradient of the one that leaves):

    o_t  = scale (q_t ⊙ e^{G_t}) S + ...       dv_s = (k_s ⊙ e^{G_C - G_s}) dS + ...
    dq_t = scale e^{G_t} ⊙ (S do_t) + ...      dk_s = e^{G_C - G_s} ⊙ (dS v_s) + ...

the first line by `value_walk_kernel`, the second by `key_walk_kernel`.

Inside a chunk the decay differs by channel and so cannot be split off a product of q and k. Pairs
s < t are sorted by the level b = 1, 2, 4, ... C/2 at which the blocks of b tokens that hold s and
t are neighbours under one block of 2b. Both are measured from the border between the two: e^{G_t -
G_s} = e^{G_t - G_border} e^{G_border - G_s}, no exponent is positive, and each level is one
product on tensor cores (`score_kernel`, `pair_gradient_kernel`). A token is on one side of its
level's border, so a level takes one exponential an element. The exponents are sums of g over spans
of tokens: products of g with a matrix of zeros and ones.

Notation: B batch, T tokens, H heads, K and V head sizes, C tokens a chunk, S segments.
q, k, v, g, o and gradients are [B, T, H, ·], their last axis contiguous; states [B, S, H, K, V]
fp32; scores [B, H, T, C].
`b_*` blocks in registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.segments import LOG2_E, negligible


@triton.jit
def summands(b_g, EXACT: tl.constexpr):
    """Log decays in the type in which spans of them are summed. Half precision holds an exponent x
    to |x| 2^-12, and e^x makes it nothing: an error of x is an error of x e^x of the decay, at
    most 1e-4."""
    if EXACT:
        b_summands = b_g.to(tl.float32)
    else:
        b_summands = tl.maximum(b_g.to(tl.float32), -60000.0).to(tl.float16)
    return b_summands


@triton.jit
def span_decay(b_span, b_summands):
    """exp of the sum of log decays over each row's span of tokens; b_span [C, C] bool, b_summands
    [C, K]."""
    b_exponent = tl.dot(b_span.to(b_summands.dtype), b_summands, input_precision="ieee")
    return tl.exp2(b_exponent * LOG2_E)


@triton.jit
def chunk_documents(doc_ids, start, T, C: tl.constexpr, PACKED: tl.constexpr):
    """document [C]; whether a token is of the document open at the chunk's start, at its end;
    whether no document starts in it."""
    o_c = tl.arange(0, C)
    b_document = o_c * 0
    b_continues, b_last, passes = o_c >= 0, o_c >= 0, start >= 0
    if PACKED:
        valid = T - start
        b_document = tl.load(doc_ids + start + tl.minimum(o_c, valid - 1))
        before = tl.load(doc_ids + start - 1, mask=start > 0, other=0)
        last = tl.load(doc_ids + start + tl.minimum(C, valid) - 1)
        b_continues, b_last, passes = b_document == before, b_document == last, last == before
    return b_document, b_continues, b_last, passes


@triton.jit
def summarize_kernel(
    y, z, g, doc_ids, state, log_decay,
    T, H, K, V, segment, scale,
    y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t, z_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    RESET: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state Σ y zᵀ that a segment's tokens leave at its end (k, v), or in reverse at its start
    (q, do).

    Grid: (blocks of K times blocks of V, S, B·H). One program owns [BK, BV] of a segment's state.
    Reads y, z and g once, writes one state a segment: bound by memory. Forward: also writes the
    segment's log decays, RESET where a document starts in it.
    """
    blocks_v = tl.cdiv(V, BV)
    block_k, block_v = tl.program_id(0) // blocks_v, tl.program_id(0) % blocks_v
    segment_index, batch, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    end = tl.minimum(first + segment, T)
    chunks = tl.cdiv(end - first, C)
    o_c, o_k, o_v = (
        tl.arange(0, C),
        block_k * BK + tl.arange(0, BK),
        block_v * BV + tl.arange(0, BV),
    )
    mask_k, mask_v = o_k < K, o_v < V
    y += batch.to(tl.int64) * y_stride_b + head.to(tl.int64) * y_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    if REVERSE:
        b_span = o_c[:, None] >= o_c[None, :]
    else:
        b_span = o_c[:, None] < o_c[None, :]

    b_state = tl.zeros([BK, BV], dtype=tl.float32)
    b_total = tl.zeros([BK], dtype=tl.float32)
    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_ck, mask_cv = mask_c[:, None] & mask_k[None, :], mask_c[:, None] & mask_v[None, :]
        p_y = y + start.to(tl.int64) * y_stride_t + o_c[:, None] * y_stride_t + o_k[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_k[None, :]
        b_y = tl.load(p_y, mask=mask_ck, other=0.0)
        b_z = tl.load(p_z, mask=mask_cv, other=0.0)
        b_g = tl.load(p_g, mask=mask_ck, other=0.0)
        _, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        b_y = b_y * span_decay(b_span, summands(b_g, PRECISION == "ieee")) * scale
        if PACKED:
            b_y = tl.where((b_continues if REVERSE else b_last)[:, None], b_y, 0.0)
        b_sum = tl.sum(b_g.to(tl.float32), axis=0)
        b_total += b_sum
        b_through = tl.where(passes, tl.exp2(b_sum * LOG2_E), 0.0)
        b_state = tl.dot(
            tl.trans(b_y.to(b_z.dtype)),
            b_z,
            b_state * b_through[:, None],
            input_precision=PRECISION,
        )

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_state, b_state, mask=mask_k[:, None] & mask_v[None, :])

    if not REVERSE:
        if block_v == 0:
            if PACKED:
                before = tl.load(doc_ids + first - 1, mask=first > 0, other=0)
                b_total = tl.where(tl.load(doc_ids + end - 1) == before, b_total, RESET)
            tl.store(log_decay + stretch * K + o_k, b_total, mask=mask_k)


@triton.jit
def score_kernel(
    q, k, g, doc_ids, scores,
    T, H, K, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scores_ts = scale Σ_K q_t k_s e^{G_t - G_s} of the pairs s <= t of a chunk.

    Grid: (chunks, B·H). Reads q, k, g once, writes C scores a token.
    """
    start, batch, head = tl.program_id(0) * C, tl.program_id(1) // H, tl.program_id(1) % H
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    q += (
        batch.to(tl.int64) * q_stride_b
        + head.to(tl.int64) * q_stride_h
        + start.to(tl.int64) * q_stride_t
    )
    k += (
        batch.to(tl.int64) * k_stride_b
        + head.to(tl.int64) * k_stride_h
        + start.to(tl.int64) * k_stride_t
    )
    g += (
        batch.to(tl.int64) * g_stride_b
        + head.to(tl.int64) * g_stride_h
        + start.to(tl.int64) * g_stride_t
    )
    if PACKED:
        doc_ids += batch.to(tl.int64) * T

    b_score = tl.zeros([C, C], dtype=tl.float32)
    for first_k in range(0, K, BK):
        o_k = first_k + tl.arange(0, BK)
        mask = mask_c[:, None] & (o_k < K)[None, :]
        b_q = tl.load(q + o_c[:, None] * q_stride_t + o_k[None, :], mask=mask, other=0.0)
        b_k = tl.load(k + o_c[:, None] * k_stride_t + o_k[None, :], mask=mask, other=0.0)
        b_g = tl.load(g + o_c[:, None] * g_stride_t + o_k[None, :], mask=mask, other=0.0)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_score += tl.where(o_c[:, None] == o_c[None, :], b_product, 0.0)
        for level in tl.static_range(LEVELS):
            b_decay = span_decay(level_span(1 << level, C), b_summands)
            b_product = tl.dot(
                (b_q * b_decay).to(b_q.dtype),
                tl.trans((b_k * b_decay).to(b_k.dtype)),
                input_precision=PRECISION,
            )
            b_score += tl.where(level_pairs(1 << level, C), b_product, 0.0)

    if PACKED:
        b_document, _, _, _ = chunk_documents(doc_ids, start, T, C, PACKED)
        b_score = tl.where(b_document[:, None] == b_document[None, :], b_score, 0.0)
    p_scores = (
        scores + (tl.program_id(1).to(tl.int64) * T + start) * C + o_c[:, None] * C + o_c[None, :]
    )
    tl.store(p_scores, (b_score * scale).to(scores.dtype.element_ty), mask=mask_c[:, None])


@triton.jit
def level_span(block: tl.constexpr, C: tl.constexpr):
    """[C, C]: the tokens u between the level's border and token t: after it up to t, or after t up
    to the border."""
    o_t, o_u = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    odd = (o_t // block) % 2 == 1
    return (o_t // block == o_u // block) & ((odd & (o_u <= o_t)) | ((odd == 0) & (o_u > o_t)))


@triton.jit
def level_pairs(block: tl.constexpr, C: tl.constexpr):
    """[C, C]: s is in the block just before t's, under one block of twice the size."""
    o_t, o_s = tl.arange(0, C)[:, None] // block, tl.arange(0, C)[None, :] // block
    return (o_t % 2 == 1) & (o_s == o_t - 1)


@triton.jit
def value_walk_kernel(
    x, y, z, g, doc_ids, scores, state, out,
    T, H, K, V, segment, scale,
    x_stride_b, x_stride_t, x_stride_h, y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t,
    z_stride_h,
    g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o from (x, y, z) = (q, k, v), or in reverse dv from (k, q, do): (x ⊙ decay) state + scores z.

    Grid: (blocks of V, S, B·H). One program owns [BK >= K, BV] of a segment's running state. Reads
    x, y, g and the scores once a block, z once, writes out once.
    """
    block_v, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    end = tl.minimum(first + segment, T)
    chunks = tl.cdiv(end - first, C)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    x += batch.to(tl.int64) * x_stride_b + head.to(tl.int64) * x_stride_h
    y += batch.to(tl.int64) * y_stride_b + head.to(tl.int64) * y_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    out += (batch.to(tl.int64) * T * H + head) * V
    scores += tl.program_id(2).to(tl.int64) * T * C
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_before, b_after = o_c[:, None] >= o_c[None, :], o_c[:, None] < o_c[None, :]

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * K * V + o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(p_state, mask=mask_k[:, None] & mask_v[None, :], other=0.0)

    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_ck, mask_cv = mask_c[:, None] & mask_k[None, :], mask_c[:, None] & mask_v[None, :]
        p_x = x + start.to(tl.int64) * x_stride_t + o_c[:, None] * x_stride_t + o_k[None, :]
        p_y = y + start.to(tl.int64) * y_stride_t + o_c[:, None] * y_stride_t + o_k[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_k[None, :]
        p_scores = scores + start.to(tl.int64) * C + o_c[:, None] * C + o_c[None, :]
        b_x = tl.load(p_x, mask=mask_ck, other=0.0)
        b_y = tl.load(p_y, mask=mask_ck, other=0.0)
        b_z = tl.load(p_z, mask=mask_cv, other=0.0)
        b_g = tl.load(p_g, mask=mask_ck, other=0.0)
        b_score = tl.load(p_scores, mask=mask_c[:, None], other=0.0)
        _, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_from_start, b_to_end = (
            span_decay(b_before, b_summands) * scale,
            span_decay(b_after, b_summands),
        )
        if PACKED:
            b_from_start = tl.where(b_continues[:, None], b_from_start, 0.0)
            b_to_end = tl.where(b_last[:, None], b_to_end, 0.0)
        b_x = (b_x * (b_to_end if REVERSE else b_from_start)).to(b_z.dtype)
        b_y = (b_y * (b_from_start if REVERSE else b_to_end)).to(b_z.dtype)
        b_out = tl.dot(b_x, b_state.to(b_z.dtype), input_precision=PRECISION)
        if REVERSE:
            b_score = tl.trans(b_score)
        b_out = tl.dot(b_score, b_z, b_out, input_precision=PRECISION)
        p_out = out + start.to(tl.int64) * H * V + o_c[:, None] * (H * V) + o_v[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_cv)
        b_through = tl.where(passes, tl.exp2(tl.sum(b_g.to(tl.float32), axis=0) * LOG2_E), 0.0)
        b_state = tl.dot(
            tl.trans(b_y), b_z, b_state * b_through[:, None], input_precision=PRECISION
        )


@triton.jit
def key_walk_kernel(
    x, y, z, own, g, doc_ids, state, out, chunk_sums, final, entering, carries,
    T, H, K, V, segment, scale,
    x_stride_b, x_stride_t, x_stride_h, y_stride_b, y_stride_t, y_stride_h, z_stride_b, z_stride_t,
    z_stride_h,
    own_stride_b, own_stride_t, own_stride_h, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What tokens outside the chunk give dq, from (x, y, z) = (do, k, v), or in reverse dk, from
    (v, q, do): decay ⊙ (state x).

    For dg, the forward walk writes Σ_t q_t ⊙ dq_t of each chunk [B, H, chunks, K]. The reverse
    walk takes them, and writes to
    `carries` what pairs with one token before a chunk and one after it give the decays in it:
    <state, its gradient> at the chunk's end, less what the chunk's own tokens have in it, and
    nothing where the chunk lets next to nothing through.

    Grid: (blocks of K, S, B·H). One program owns [BK, BV >= V] of a segment's running state. Reads
    x and z once a block, y, own (q, or in reverse k) and g once, writes out once.
    """
    block_k, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    end = tl.minimum(first + segment, T)
    chunks = tl.cdiv(end - first, C)
    o_c, o_k, o_v = tl.arange(0, C), block_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    mask_kv = mask_k[:, None] & mask_v[None, :]
    x += batch.to(tl.int64) * x_stride_b + head.to(tl.int64) * x_stride_h
    y += batch.to(tl.int64) * y_stride_b + head.to(tl.int64) * y_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    own += batch.to(tl.int64) * own_stride_b + head.to(tl.int64) * own_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    out += (batch.to(tl.int64) * T * H + head) * K
    chunk_sums += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_before, b_after = o_c[:, None] >= o_c[None, :], o_c[:, None] < o_c[None, :]

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_kv = o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(state + stretch * K * V + o_kv, mask=mask_kv, other=0.0)
    b_carry = tl.zeros([BK], dtype=tl.float32)
    if REVERSE:
        carries += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K
        p_leaving = entering + (stretch + H) * K * V
        if segment_index == tl.num_programs(1) - 1:
            p_leaving = final + tl.program_id(2).to(tl.int64) * K * V
        b_carry = tl.sum(b_state * tl.load(p_leaving + o_kv, mask=mask_kv, other=0.0), axis=1)

    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_ck, mask_cv = mask_c[:, None] & mask_k[None, :], mask_c[:, None] & mask_v[None, :]
        p_x = x + start.to(tl.int64) * x_stride_t + o_c[:, None] * x_stride_t + o_v[None, :]
        p_y = y + start.to(tl.int64) * y_stride_t + o_c[:, None] * y_stride_t + o_k[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        p_own = own + start.to(tl.int64) * own_stride_t + o_c[:, None] * own_stride_t + o_k[None, :]
        p_g = g + start.to(tl.int64) * g_stride_t + o_c[:, None] * g_stride_t + o_k[None, :]
        b_x = tl.load(p_x, mask=mask_cv, other=0.0)
        b_y = tl.load(p_y, mask=mask_ck, other=0.0)
        b_z = tl.load(p_z, mask=mask_cv, other=0.0)
        b_g = tl.load(p_g, mask=mask_ck, other=0.0)
        b_own = tl.load(p_own, mask=mask_ck, other=0.0)
        _, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_from_start, b_to_end = (
            span_decay(b_before, b_summands) * scale,
            span_decay(b_after, b_summands),
        )
        if PACKED:
            b_from_start = tl.where(b_continues[:, None], b_from_start, 0.0)
            b_to_end = tl.where(b_last[:, None], b_to_end, 0.0)
        b_y = (b_y * (b_from_start if REVERSE else b_to_end)).to(b_z.dtype)
        b_out = tl.dot(b_x, tl.trans(b_state.to(b_x.dtype)), input_precision=PRECISION)
        b_out *= b_to_end if REVERSE else b_from_start
        p_out = out + start.to(tl.int64) * H * K + o_c[:, None] * (H * K) + o_k[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_ck)

        b_through = tl.where(passes, tl.exp2(tl.sum(b_g.to(tl.float32), axis=0) * LOG2_E), 0.0)
        b_sums = tl.sum(b_own * b_out, axis=0)
        at = (start // C).to(tl.int64) * K + o_k
        if REVERSE:
            b_across = tl.where(b_through > negligible(PRECISION == "ieee"), b_carry - b_sums, 0.0)
            tl.store(carries + at, b_across, mask=mask_k)
            b_carry = b_across + tl.load(chunk_sums + at, mask=mask_k, other=0.0)
        else:
            tl.store(chunk_sums + at, b_sums, mask=mask_k)
        b_state = tl.dot(
            tl.trans(b_y), b_z, b_state * b_through[:, None], input_precision=PRECISION
        )


@triton.jit
def span_gradient(b_span, b_gradient, EXACT: tl.constexpr):
    """The log decays' gradient from that of `span_decay`'s exponents."""
    span_type: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    return tl.dot(tl.trans(b_span.to(span_type)), b_gradient.to(span_type), input_precision="ieee")


@triton.jit
def pair_gradient_kernel(
    q, k, v, do, g, doc_ids, carries, dq, dk, dg,
    T, H, K, V, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t,
    v_stride_h,
    do_stride_b, do_stride_t, do_stride_h, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq and dk, which hold what other chunks give, what the pairs of a chunk give; then
    dg.

    q_t ⊙ dq_t and k_s ⊙ dk_s are the gradients of the exponents in the decays on both sides of a
    border: from the other chunks of the sums from the chunk's start and to its end, and from each
    level of its own spans.

    Grid: (blocks of K, chunks, B·H). Reads q, k, g once, v and do once a block; reads and writes
    dq and dk, writes dg.
    """
    start, batch, head = tl.program_id(1) * C, tl.program_id(2) // H, tl.program_id(2) % H
    o_c, o_k = tl.arange(0, C), tl.program_id(0) * BK + tl.arange(0, BK)
    mask_c, mask_k = o_c < T - start, o_k < K
    mask_ck = mask_c[:, None] & mask_k[None, :]
    q += (
        batch.to(tl.int64) * q_stride_b
        + head.to(tl.int64) * q_stride_h
        + start.to(tl.int64) * q_stride_t
    )
    k += (
        batch.to(tl.int64) * k_stride_b
        + head.to(tl.int64) * k_stride_h
        + start.to(tl.int64) * k_stride_t
    )
    v += (
        batch.to(tl.int64) * v_stride_b
        + head.to(tl.int64) * v_stride_h
        + start.to(tl.int64) * v_stride_t
    )
    do += (
        batch.to(tl.int64) * do_stride_b
        + head.to(tl.int64) * do_stride_h
        + start.to(tl.int64) * do_stride_t
    )
    g += (
        batch.to(tl.int64) * g_stride_b
        + head.to(tl.int64) * g_stride_h
        + start.to(tl.int64) * g_stride_t
    )
    o_out = (
        ((batch.to(tl.int64) * T + start) * H + head) * K + o_c[:, None] * (H * K) + o_k[None, :]
    )
    if PACKED:
        doc_ids += batch.to(tl.int64) * T

    b_ds = tl.zeros([C, C], dtype=tl.float32)  # the scores' gradient
    for first_v in range(0, V, BV):
        o_v = first_v + tl.arange(0, BV)
        mask = mask_c[:, None] & (o_v < V)[None, :]
        b_v = tl.load(v + o_c[:, None] * v_stride_t + o_v[None, :], mask=mask, other=0.0)
        b_do = tl.load(do + o_c[:, None] * do_stride_t + o_v[None, :], mask=mask, other=0.0)
        b_ds = tl.dot(b_do, tl.trans(b_v), b_ds, input_precision=PRECISION)
    b_ds *= scale
    b_document, _, _, _ = chunk_documents(doc_ids, start, T, C, PACKED)
    b_same = b_document[:, None] == b_document[None, :]
    if PACKED:
        b_ds = tl.where(b_same, b_ds, 0.0)

    b_q = tl.load(q + o_c[:, None] * q_stride_t + o_k[None, :], mask=mask_ck, other=0.0)
    b_k = tl.load(k + o_c[:, None] * k_stride_t + o_k[None, :], mask=mask_ck, other=0.0)
    b_g = tl.load(g + o_c[:, None] * g_stride_t + o_k[None, :], mask=mask_ck, other=0.0)
    b_dq = tl.load(dq + o_out, mask=mask_ck, other=0.0).to(tl.float32)
    b_dk = tl.load(dk + o_out, mask=mask_ck, other=0.0).to(tl.float32)
    b_before = (o_c[:, None] >= o_c[None, :]) & b_same
    b_after = (o_c[:, None] < o_c[None, :]) & b_same
    b_dg = span_gradient(b_before, b_q * b_dq, PRECISION == "ieee")
    b_dg += span_gradient(b_after, b_k * b_dk, PRECISION == "ieee")
    b_summands = summands(b_g, PRECISION == "ieee")
    for level in tl.static_range(LEVELS):
        b_span = level_span(1 << level, C)
        b_decay = span_decay(b_span, b_summands)
        b_level = tl.where(level_pairs(1 << level, C), b_ds, 0.0).to(b_q.dtype)
        b_dq_level = b_decay * tl.dot(
            b_level, (b_k * b_decay).to(b_k.dtype), input_precision=PRECISION
        )
        b_dk_level = b_decay * tl.dot(
            tl.trans(b_level), (b_q * b_decay).to(b_q.dtype), input_precision=PRECISION
        )
        b_dg += span_gradient(b_span, b_q * b_dq_level + b_k * b_dk_level, PRECISION == "ieee")
        b_dq += b_dq_level
        b_dk += b_dk_level

    p_carry = carries + (tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) + start // C) * K + o_k
    b_dg += tl.load(p_carry, mask=mask_k, other=0.0)[None, :]
    tl.store(dg + o_out, b_dg.to(dg.dtype.element_ty), mask=mask_ck)

    b_self = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_ds, 0.0), axis=1)[:, None]
    tl.store(dq + o_out, (b_dq + b_self * b_k).to(dq.dtype.element_ty), mask=mask_ck)
    tl.store(dk + o_out, (b_dk + b_self * b_q).to(dk.dtype.element_ty), mask=mask_ck)
