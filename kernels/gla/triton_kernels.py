"""Kernels of GLA, forward and backward.

With G the running sum of g inside a chunk of C tokens, S the state that enters it and dS the
gradient of the one that leaves it:

    o_t  = q̄_t S + Σ_{s<=t} A_ts v_s        dq_t = scale e^{G_t} ⊙ (S do_t) + ...
    dv_s = k̄_s dS + Σ_{t>=s} A_ts do_t      dk_s = e^{G_C - G_s} ⊙ (dS v_s) + ...
    q̄_t = scale e^{G_t} ⊙ q_t               k̄_s = e^{G_C - G_s} ⊙ k_s

`prepare_kernel` computes q̄, k̄ and the scores A, so that what walks the chunks of a segment
(`summarize_kernel`, `value_walk_kernel`, `key_walk_kernel`) sees neither gates nor documents.
`pair_gradient_kernel` adds what the pairs inside a chunk give dq and dk, and computes dg.

Inside a chunk the decay differs by channel and so cannot be split off a product of q and k. Pairs
s < t are sorted by the level b = 1, 2, 4, ... C/2 at which the blocks of b tokens that hold s and
t are neighbours under one block of 2b. Both are measured from the border between the two: e^{G_t -
G_s} = e^{G_t - G_border} e^{G_border - G_s}, no exponent is positive, and each level is one
product on tensor cores. A token is on one side of its level's border: later tokens enter with q,
earlier ones with k, all in one matrix. The exponents are sums of g over spans of tokens: products
of g with a matrix of zeros and ones.

Notation: B batch, T tokens, H heads, K and V head sizes, C tokens a chunk, N chunks, S segments.
q, k, v, g, o and gradients are [B, T, H, ·], their last axis contiguous; q̄, k̄ [B, H, T, K]; scores
[B, H, T, C]; states [B, S, H, K, V] fp32; decays of chunks [B, H, N, K] fp32.
`b_*` blocks in registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.levels import chunk_documents, is_later, level_pairs, summands
from fla_dist.kernels.common.segments import LOG2_E, negligible


@triton.jit
def prepare_kernel(
    q, k, g, doc_ids, spans, q_in, k_out, chunk_decay, scores,
    T, H, K, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    RESET: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q̄ and k̄, zero where a document keeps the token from the chunk's start or its end; the
    chunk's log decay, RESET where a document starts in it; scores_ts = scale Σ_K q_t k_s
    e^{G_t - G_s} of the pairs s <= t.

    Grid: (N, B·H). Reads q, k, g once, writes q̄, k̄ and C scores a token.
    """
    chunk, batch, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    start = chunk * C
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    q += (
        batch.to(tl.int64) * q_stride_b
        + start.to(tl.int64) * q_stride_t
        + head.to(tl.int64) * q_stride_h
    )
    k += (
        batch.to(tl.int64) * k_stride_b
        + start.to(tl.int64) * k_stride_t
        + head.to(tl.int64) * k_stride_h
    )
    g += (
        batch.to(tl.int64) * g_stride_b
        + start.to(tl.int64) * g_stride_t
        + head.to(tl.int64) * g_stride_h
    )
    row = tl.program_id(1).to(tl.int64) * T + start
    q_in += row * K
    k_out += row * K
    chunk_decay += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + chunk) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
    o_pair = o_c[:, None] * C + o_c[None, :]
    b_score = tl.zeros([C, C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=1):
        o_k = first_k + tl.arange(0, BK)
        mask_k = o_k < K
        mask = mask_c[:, None] & mask_k[None, :]
        b_q = tl.load(q + o_c[:, None] * q_stride_t + o_k[None, :], mask=mask, other=0.0)
        b_k = tl.load(k + o_c[:, None] * k_stride_t + o_k[None, :], mask=mask, other=0.0)
        b_g = tl.load(g + o_c[:, None] * g_stride_t + o_k[None, :], mask=mask, other=0.0)
        b_summands = summands(b_g, PRECISION == "ieee")

        o_ck = o_c[:, None] * K + o_k[None, :]
        b_before = tl.load(spans + LEVELS * C * C + o_pair)
        b_after = tl.load(spans + (LEVELS + 1) * C * C + o_pair)
        b_in = b_q * tl.exp2(tl.dot(b_before, b_summands, input_precision="ieee")) * scale
        b_out = b_k * tl.exp2(tl.dot(b_after, b_summands, input_precision="ieee"))
        b_total = tl.sum(b_g.to(tl.float32), axis=0)
        if PACKED:
            b_in = tl.where(b_continues[:, None], b_in, 0.0)
            b_out = tl.where(b_last[:, None], b_out, 0.0)
            b_total = tl.where(passes, b_total, RESET)
        tl.store(q_in + o_ck, b_in.to(q_in.dtype.element_ty), mask=mask)
        tl.store(k_out + o_ck, b_out.to(k_out.dtype.element_ty), mask=mask)
        tl.store(chunk_decay + o_k, b_total, mask=mask_k)

        b_product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_score += tl.where(o_c[:, None] == o_c[None, :], b_product, 0.0)
        for level in tl.range(0, LEVELS, num_stages=1):
            b_span = tl.load(spans + level * C * C + o_pair)
            b_decay = tl.exp2(tl.dot(b_span, b_summands, input_precision="ieee"))
            b_side = (tl.where(is_later(o_c, level)[:, None], b_q, b_k) * b_decay).to(b_q.dtype)
            b_product = tl.dot(b_side, tl.trans(b_side), input_precision=PRECISION)
            b_score += tl.where(level_pairs(o_c, level), b_product, 0.0)

    visible = o_c[:, None] >= o_c[None, :]
    if PACKED:
        visible = visible & (b_document[:, None] == b_document[None, :])
    b_score = tl.where(visible, b_score * scale, 0.0)
    p_scores = scores + row * C + o_pair
    tl.store(p_scores, b_score.to(scores.dtype.element_ty), mask=mask_c[:, None])


@triton.jit
def summarize_kernel(
    y, z, chunk_decay, state, log_decay,
    T, H, K, V, segment, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state Σ y zᵀ that a segment's tokens leave at its end (k̄, v), or in reverse at its start
    (q̄, do).

    Grid: (blocks of K times blocks of V, S, B·H). One program owns [BK, BV] of a segment's state.
    Reads y and z once, writes one state a segment: bound by memory. Forward: also writes the
    segment's log decays.
    """
    blocks_v = tl.cdiv(V, BV)
    block_k, block_v = tl.program_id(0) // blocks_v, tl.program_id(0) % blocks_v
    segment_index, batch, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c = tl.arange(0, C)
    o_k, o_v = block_k * BK + tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    y += tl.program_id(2).to(tl.int64) * T * K
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    chunk_decay += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K

    b_state = tl.zeros([BK, BV], dtype=tl.float32)
    b_total = tl.zeros([BK], dtype=tl.float32)
    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        p_y = y + start.to(tl.int64) * K + o_c[:, None] * K + o_k[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        p_decay = chunk_decay + (start // C).to(tl.int64) * K + o_k
        b_y = tl.load(p_y, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        b_z = tl.load(p_z, mask=mask_c[:, None] & mask_v[None, :], other=0.0)
        b_decay = tl.load(p_decay, mask=mask_k, other=0.0)
        b_total += b_decay
        b_state *= tl.exp2(b_decay * LOG2_E)[:, None]
        b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision=PRECISION)

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_state, b_state, mask=mask_k[:, None] & mask_v[None, :])
    if not REVERSE:
        if block_v == 0:
            tl.store(log_decay + stretch * K + o_k, b_total, mask=mask_k)


@triton.jit
def value_walk_kernel(
    x, y, z, chunk_decay, scores, state, out,
    T, H, K, V, segment, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o from (x, y, z) = (q̄, k̄, v), or in reverse dv from (k̄, q̄, do): x state + scores z.

    Grid: (blocks of V, S, B·H). One program owns [BK >= K, BV] of a segment's running state. Reads
    x, y and the scores once a block, z once, writes out once.
    """
    block_v, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    x += tl.program_id(2).to(tl.int64) * T * K
    y += tl.program_id(2).to(tl.int64) * T * K
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    out += (batch.to(tl.int64) * T * H + head) * V
    scores += tl.program_id(2).to(tl.int64) * T * C
    chunk_decay += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K

    o_pair = o_c[:, None] * C + o_c[None, :]
    o_transposed = o_c[None, :] * C + o_c[:, None]
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = state + stretch * K * V + o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(p_state, mask=mask_k[:, None] & mask_v[None, :], other=0.0)

    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_ck, mask_cv = mask_c[:, None] & mask_k[None, :], mask_c[:, None] & mask_v[None, :]
        o_ck = start.to(tl.int64) * K + o_c[:, None] * K + o_k[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        p_scores = scores + start.to(tl.int64) * C
        if REVERSE:
            b_score = tl.load(p_scores + o_transposed, mask=mask_c[None, :], other=0.0)
        else:
            b_score = tl.load(p_scores + o_pair, mask=mask_c[:, None], other=0.0)
        b_x = tl.load(x + o_ck, mask=mask_ck, other=0.0)
        b_y = tl.load(y + o_ck, mask=mask_ck, other=0.0)
        b_z = tl.load(p_z, mask=mask_cv, other=0.0)
        b_decay = tl.load(chunk_decay + (start // C).to(tl.int64) * K + o_k, mask=mask_k, other=0.0)
        b_out = tl.dot(b_x, b_state.to(b_z.dtype), input_precision=PRECISION)
        b_out = tl.dot(b_score, b_z, b_out, input_precision=PRECISION)
        p_out = out + start.to(tl.int64) * H * V + o_c[:, None] * (H * V) + o_v[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_cv)
        b_state *= tl.exp2(b_decay * LOG2_E)[:, None]
        b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision=PRECISION)


@triton.jit
def key_walk_kernel(
    x, y, z, own, chunk_decay, state, out, chunk_sums, final, entering, carries,
    T, H, K, V, segment, scale,
    x_stride_b, x_stride_t, x_stride_h, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """state x, for what tokens outside the chunk give: scale S do from (x, y, z, own) = (do, k̄, v,
    q̄), or in reverse dS v from (v, q̄, do, k̄).

    For dg, the forward walk writes Σ_t q̄_t ⊙ (S do_t) of each chunk [B, H, N, K]. The reverse walk
    takes them, and writes to `carries` what pairs with one token before a chunk and one after it
    give the decays in it: <state, its gradient> at the chunk's end, less what the chunk's own
    tokens have in it, and nothing where the chunk lets next to nothing through.

    Grid: (blocks of K, S, B·H). One program owns [BK, BV >= V] of a segment's running state. Reads
    x and z once a block, y and own once, writes out once.
    """
    block_k, segment_index = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // H, tl.program_id(2) % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), block_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    mask_kv = mask_k[:, None] & mask_v[None, :]
    x += batch.to(tl.int64) * x_stride_b + head.to(tl.int64) * x_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    y += tl.program_id(2).to(tl.int64) * T * K
    own += tl.program_id(2).to(tl.int64) * T * K
    out += (batch.to(tl.int64) * T * H + head) * K
    chunk_decay += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K
    chunk_sums += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K
    carries += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_kv = o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(state + stretch * K * V + o_kv, mask=mask_kv, other=0.0)
    b_carry = tl.zeros([BK], dtype=tl.float32)
    if REVERSE:
        p_leaving = entering + (stretch + H) * K * V
        if segment_index == tl.num_programs(1) - 1:
            p_leaving = final + tl.program_id(2).to(tl.int64) * K * V
        b_carry = tl.sum(b_state * tl.load(p_leaving + o_kv, mask=mask_kv, other=0.0), axis=1)

    for i in range(chunks):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_ck, mask_cv = mask_c[:, None] & mask_k[None, :], mask_c[:, None] & mask_v[None, :]
        o_ck = start.to(tl.int64) * K + o_c[:, None] * K + o_k[None, :]
        p_x = x + start.to(tl.int64) * x_stride_t + o_c[:, None] * x_stride_t + o_v[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        o_chunk = (start // C).to(tl.int64) * K + o_k
        b_x = tl.load(p_x, mask=mask_cv, other=0.0)
        b_y = tl.load(y + o_ck, mask=mask_ck, other=0.0)
        b_z = tl.load(p_z, mask=mask_cv, other=0.0)
        b_own = tl.load(own + o_ck, mask=mask_ck, other=0.0)
        b_through = tl.exp2(tl.load(chunk_decay + o_chunk, mask=mask_k, other=0.0) * LOG2_E)
        b_out = tl.dot(b_x, tl.trans(b_state.to(b_x.dtype)), input_precision=PRECISION)
        b_sums = tl.sum(b_own * b_out, axis=0)
        p_out = out + start.to(tl.int64) * H * K + o_c[:, None] * (H * K) + o_k[None, :]
        if REVERSE:
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask_ck)
            b_across = tl.where(b_through > negligible(PRECISION == "ieee"), b_carry - b_sums, 0.0)
            tl.store(carries + o_chunk, b_across, mask=mask_k)
            b_carry = b_across + tl.load(chunk_sums + o_chunk, mask=mask_k, other=0.0)
        else:
            tl.store(p_out, (b_out * scale).to(out.dtype.element_ty), mask=mask_ck)
            tl.store(chunk_sums + o_chunk, b_sums, mask=mask_k)
        b_state *= b_through[:, None]
        b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision=PRECISION)


@triton.jit
def pair_gradient_kernel(
    q, k, v, do, g, doc_ids, spans, gradient_spans, carries, dq, dk, dg,
    T, H, K, V, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t,
    v_stride_h,
    do_stride_b, do_stride_t, do_stride_h, g_stride_b, g_stride_t, g_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk, which hold what `key_walk_kernel` wrote, from the tokens outside the chunk and
    from its pairs; then dg.

    q_t ⊙ dq_t and k_s ⊙ dk_s are the gradients of the exponents in the decays on both sides of a
    border: from the other chunks of the sums from the chunk's start and to its end, and from each
    level of its own spans.

    Grid: (N, B·H). Reads q, k, g, v, do once; reads and writes dq and dk, writes dg.
    """
    start, batch, head = tl.program_id(0) * C, tl.program_id(1) // H, tl.program_id(1) % H
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    v += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    q += start.to(tl.int64) * q_stride_t
    k += start.to(tl.int64) * k_stride_t
    v += start.to(tl.int64) * v_stride_t
    do += start.to(tl.int64) * do_stride_t
    g += start.to(tl.int64) * g_stride_t
    carries += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K
    o_out = ((batch.to(tl.int64) * T + start) * H + head) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, _ = chunk_documents(doc_ids, start, T, C, PACKED)

    # The scores' gradient, mirrored at the diagonal.
    b_ds = tl.zeros([C, C], dtype=tl.float32)
    b_ds_transposed = tl.zeros([C, C], dtype=tl.float32)
    for first_v in tl.range(0, V, BV, num_stages=1):
        o_v = first_v + tl.arange(0, BV)
        mask = mask_c[:, None] & (o_v < V)[None, :]
        b_v = tl.load(v + o_c[:, None] * v_stride_t + o_v[None, :], mask=mask, other=0.0)
        b_do = tl.load(do + o_c[:, None] * do_stride_t + o_v[None, :], mask=mask, other=0.0)
        b_ds = tl.dot(b_do, tl.trans(b_v), b_ds, input_precision=PRECISION)
        b_ds_transposed = tl.dot(b_v, tl.trans(b_do), b_ds_transposed, input_precision=PRECISION)
    b_ds = tl.where(o_c[:, None] >= o_c[None, :], b_ds, b_ds_transposed) * scale
    if PACKED:
        b_ds = tl.where(b_document[:, None] == b_document[None, :], b_ds, 0.0)
    b_self = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_ds, 0.0), axis=0)

    # Everything else is transposed, [K, C]: what one product returns enters the next as it is.
    o_pair = o_c[:, None] * C + o_c[None, :]
    o_transposed = o_c[None, :] * C + o_c[:, None]
    for first_k in tl.range(0, K, BK, num_stages=1):
        o_k = first_k + tl.arange(0, BK)
        mask_k = o_k < K
        mask = mask_k[:, None] & mask_c[None, :]
        p_out = o_out + o_k[:, None] + o_c[None, :] * (H * K)
        b_g = tl.load(g + o_k[:, None] + o_c[None, :] * g_stride_t, mask=mask, other=0.0)
        b_q = tl.load(q + o_k[:, None] + o_c[None, :] * q_stride_t, mask=mask, other=0.0)
        b_k = tl.load(k + o_k[:, None] + o_c[None, :] * k_stride_t, mask=mask, other=0.0)
        b_dq = tl.load(dq + p_out, mask=mask, other=0.0).to(tl.float32)
        b_dk = tl.load(dk + p_out, mask=mask, other=0.0).to(tl.float32)
        if PACKED:
            b_dq = tl.where(b_continues[None, :], b_dq, 0.0)
            b_dk = tl.where(b_last[None, :], b_dk, 0.0)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_before = tl.load(spans + LEVELS * C * C + o_transposed)
        b_after = tl.load(spans + (LEVELS + 1) * C * C + o_transposed)
        b_dq *= tl.exp2(tl.dot(b_summands, b_before, input_precision="ieee"))
        b_dk *= tl.exp2(tl.dot(b_summands, b_after, input_precision="ieee"))
        b_before = tl.load(gradient_spans + LEVELS * C * C + o_pair)
        b_after = tl.load(gradient_spans + (LEVELS + 1) * C * C + o_pair)
        b_dg = tl.dot((b_q * b_dq).to(b_before.dtype), b_before, input_precision="ieee")
        b_dg = tl.dot((b_k * b_dk).to(b_after.dtype), b_after, b_dg, input_precision="ieee")
        for level in tl.range(0, LEVELS, num_stages=1):
            b_span = tl.load(spans + level * C * C + o_transposed)
            b_gradient_span = tl.load(gradient_spans + level * C * C + o_pair)
            later = is_later(o_c, level)[None, :]
            b_decay = tl.exp2(tl.dot(b_summands, b_span, input_precision="ieee"))
            b_later, b_earlier = tl.where(later, b_decay, 0.0), tl.where(later, 0.0, b_decay)
            b_side = b_q * b_later + b_k * b_earlier
            b_level = tl.where(level_pairs(o_c, level), b_ds, 0.0).to(v.dtype.element_ty)
            b_gradient = tl.dot(b_side.to(b_level.dtype), b_level, input_precision=PRECISION)
            b_change = (b_side * b_gradient).to(b_gradient_span.dtype)
            b_dg = tl.dot(b_change, b_gradient_span, b_dg, input_precision="ieee")
            b_dq += b_gradient * b_later
            b_dk += b_gradient * b_earlier
        b_dg += tl.load(carries + o_k, mask=mask_k, other=0.0)[:, None]
        b_dq += b_self[None, :] * b_k
        b_dk += b_self[None, :] * b_q
        tl.store(dg + p_out, b_dg.to(dg.dtype.element_ty), mask=mask)
        tl.store(dq + p_out, b_dq.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + p_out, b_dk.to(dk.dtype.element_ty), mask=mask)
