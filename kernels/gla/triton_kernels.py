"""Kernels of GLA, forward and backward.

With G the running sum of g inside a chunk of C tokens, S the state that enters it and dS the
gradient of the one that leaves it:

    o_t  = q̄_t S + Σ_{s<=t} A_ts v_s        dq_t = scale e^{G_t} ⊙ (S do_t) + ...
    dv_s = k̄_s dS + Σ_{t>=s} A_ts do_t      dk_s = e^{G_C - G_s} ⊙ (dS v_s) + ...
    q̄_t = scale e^{G_t} ⊙ q_t               k̄_s = e^{G_C - G_s} ⊙ k_s

`prepare_kernel` computes q̄, k̄ and the scores A, so that what walks the chunks of a segment
(`summarize_kernel`, `walk_kernel`) sees neither gates nor documents. The walk for dq also writes
the scores' gradient. `pair_gradient_kernel` adds what the pairs inside a chunk give dq and dk, and
computes dg.

Inside a chunk the decay differs by channel and so cannot be split off a product of q and k. A chunk
is two tiles of 16 tokens, and one warp's work. Pairs s < t in one tile are sorted by the level
b = 1, 2, 4, 8 at which the blocks of b tokens that hold s and t are neighbours under one block of
2b; pairs in two tiles are the level above. Both are measured from the border between the two:
e^{G_t - G_s} = e^{G_t - G_border} e^{G_border - G_s}, no exponent is positive, and each level is
one product on tensor cores. A token is on one side of its level's border: later tokens enter with
q, earlier ones with k, all in one matrix. The decay to a level's border is that to the border of
the level below times that of a whole block, so one exponential a token serves all levels. What the
exponents' gradients are summed over are spans of tokens: products with a matrix of zeros and ones.

A token that sees the state before it (RWKV6) has spans that end before it, and a bonus u for
itself. Keys that are 1 - e^g (HGRN2) are computed from g, and their gradient goes to dg.

Notation: B batch, T tokens, H heads, K and V head sizes, C tokens a chunk, N chunks, S segments.
q, k, v, g, o and gradients are [B, T, H, ·], their last axis contiguous; q̄, k̄ [B, H, T, K]; scores
[B, H, T, C]; states [B, S, H, K, V] fp32; decays of chunks [B, H, N, K] fp32.
`b_*` blocks in registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.levels import (
    documents,
    first_decays,
    is_later,
    level_pairs,
    load_spans,
    next_decays,
    open_documents,
    program_chunk,
    summands,
)
from fla_dist.kernels.common.segments import LOG2_E, negligible


@triton.jit
def sum_spans(b_change, b_span, b_sum, SPLIT: tl.constexpr):
    """Adds sums of b_change over spans, in b_span's type; split in two parts, beyond its digits."""
    b_high = b_change.to(b_span.dtype)
    b_sum = tl.dot(b_high, b_span, b_sum, input_precision="ieee")
    if SPLIT:
        b_low = (b_change - b_high.to(tl.float32)).to(b_span.dtype)
        b_sum = tl.dot(b_low, b_span, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def free_part(b_g, b_single):
    """1 - e^g from g and e^g; near 0 by a series, in which no digits cancel."""
    b_g = b_single * 0 + b_g
    b_series = -b_g * (1 + b_g * (0.5 + b_g * (1 / 6 + b_g * (1 / 24 + b_g / 120))))
    return tl.where(b_g > -0.1, b_series, 1 - b_single)


@triton.jit
def load_tile(x, stride_t, o_row, o_column, mask):
    return tl.load(x + o_row * stride_t + o_column, mask=mask, other=0.0)


@triton.jit
def tile_scores(
    b_q, b_k, b_block, b_score, o_c, EXCLUSIVE: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Adds Σ_K q_t k_s e^{G_t - G_s} of the pairs s < t in one tile, and its mirror image. Returns
    also q as decayed from the tile's start, k to its end, and the decay through it. b_block: the
    decays of single tokens."""
    b_before, b_after = b_q, b_k
    if not EXCLUSIVE:
        b_before = b_q * b_block
    for level in tl.static_range(LEVELS):
        later = is_later(o_c, level)[:, None]
        b_side = tl.where(later, b_before, b_after)
        b_rounded = b_side.to(dtype)
        b_product = tl.dot(b_rounded, tl.trans(b_side).to(dtype), input_precision=PRECISION)
        b_score += tl.where(level_pairs(o_c, level), b_product, 0.0)
        b_before, b_after, b_block = next_decays(
            b_before, b_after, b_block, b_side, later, 0, level
        )
    return b_score, b_before, b_after, b_block


@Kernel
@triton.jit
def prepare_kernel(
    q, k, g, bonus, doc_ids, identity, q_in, k_out, chunk_decay, scores,
    T, H, K, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    RESET: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    FREE_KEYS: tl.constexpr, BONUS: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q̄ and k̄, zero where a document keeps the token from the chunk's start or its end; the
    chunk's log decay, RESET where a document starts in it; scores_ts = scale Σ_K q_t k_s
    e^{G_t - G_s} of the pairs s <= t.

    Grid: (N·H, B). Reads q, k, g once, writes q̄, k̄ and C scores a token. `_0` and `_1` are the
    chunk's two tiles.
    """
    C: tl.constexpr = 2 * TILE
    batch, chunk, head = program_chunk(H)
    start = chunk * C
    o_0 = tl.arange(0, TILE)
    o_1 = TILE + o_0
    mask_0, mask_1 = o_0 < T - start, o_1 < T - start
    q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    q += start.to(tl.int64) * q_stride_t
    k += start.to(tl.int64) * k_stride_t
    g += start.to(tl.int64) * g_stride_t
    stream = batch.to(tl.int64) * H + head
    row = stream * T + start
    q_in += row * K
    k_out += row * K
    chunk_decay += (stream * tl.cdiv(T, C) + chunk) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
        before, last = open_documents(doc_ids, start, T, C)
        b_document_0 = documents(doc_ids, start, T, TILE)
        b_document_1 = documents(doc_ids, start + TILE, T, TILE)
    o_pair = o_0[:, None] * TILE + o_0[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    b_identity = tl.load(identity + o_pair)
    b_all = tl.full([TILE, TILE], 1.0, dtype=identity.dtype.element_ty)
    b_score_0 = tl.zeros([TILE, TILE], dtype=tl.float32)
    b_score_1 = tl.zeros([TILE, TILE], dtype=tl.float32)
    b_score_10 = tl.zeros([TILE, TILE], dtype=tl.float32)
    b_self_0 = tl.zeros([TILE], dtype=tl.float32)
    b_self_1 = tl.zeros([TILE], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask_k = (o_k < K)[None, :]
        mask_k0, mask_k1 = mask_0[:, None] & mask_k, mask_1[:, None] & mask_k
        b_q_0 = load_tile(q, q_stride_t, o_0[:, None], o_k[None, :], mask_k0)
        b_q_1 = load_tile(q, q_stride_t, o_1[:, None], o_k[None, :], mask_k1)
        b_g_0 = load_tile(g, g_stride_t, o_0[:, None], o_k[None, :], mask_k0)
        b_g_1 = load_tile(g, g_stride_t, o_1[:, None], o_k[None, :], mask_k1)
        if not FREE_KEYS:
            b_k_0 = load_tile(k, k_stride_t, o_0[:, None], o_k[None, :], mask_k0)
            b_k_1 = load_tile(k, k_stride_t, o_1[:, None], o_k[None, :], mask_k1)
        b_summands_0 = summands(b_g_0, PRECISION == "ieee")
        b_summands_1 = summands(b_g_1, PRECISION == "ieee")
        # Nothing is summed here, but what comes is in the products' layout.
        b_single_0 = tl.exp2(tl.dot(b_identity, b_summands_0, input_precision="ieee"))
        b_single_1 = tl.exp2(tl.dot(b_identity, b_summands_1, input_precision="ieee"))
        b_q_0, b_q_1 = b_single_0 * 0 + b_q_0, b_single_1 * 0 + b_q_1
        if FREE_KEYS:
            b_k_0, b_k_1 = free_part(b_g_0, b_single_0), free_part(b_g_1, b_single_1)
        else:
            b_k_0, b_k_1 = b_single_0 * 0 + b_k_0, b_single_1 * 0 + b_k_1
        b_score_0, b_in_0, b_near_k, b_through_0 = tile_scores(
            b_q_0, b_k_0, b_single_0, b_score_0, o_0, BONUS, LEVELS, PRECISION, dtype
        )
        b_score_1, b_near_q, b_out_1, b_through_1 = tile_scores(
            b_q_1, b_k_1, b_single_1, b_score_1, o_0, BONUS, LEVELS, PRECISION, dtype
        )
        b_score_10 = tl.dot(
            b_near_q.to(dtype), tl.trans(b_near_k).to(dtype), b_score_10, input_precision=PRECISION
        )
        b_total = tl.dot(b_all, b_summands_0, input_precision="ieee")
        b_total = tl.dot(b_all, b_summands_1, b_total, input_precision="ieee") * (1 / LOG2_E)
        b_in_0, b_in_1 = b_in_0 * scale, b_near_q * (b_through_0 * scale)
        b_out_0 = b_near_k * b_through_1
        if PACKED:
            b_in_0 = tl.where((b_document_0 == before)[:, None], b_in_0, 0.0)
            b_in_1 = tl.where((b_document_1 == before)[:, None], b_in_1, 0.0)
            b_out_0 = tl.where((b_document_0 == last)[:, None], b_out_0, 0.0)
            b_out_1 = tl.where((b_document_1 == last)[:, None], b_out_1, 0.0)
            b_total = tl.where(before == last, b_total, RESET)
        o_0k = o_0[:, None] * K + o_k[None, :]
        o_1k = o_1[:, None] * K + o_k[None, :]
        tl.store(q_in + o_0k, b_in_0.to(q_in.dtype.element_ty), mask=mask_k0)
        tl.store(q_in + o_1k, b_in_1.to(q_in.dtype.element_ty), mask=mask_k1)
        tl.store(k_out + o_0k, b_out_0.to(k_out.dtype.element_ty), mask=mask_k0)
        tl.store(k_out + o_1k, b_out_1.to(k_out.dtype.element_ty), mask=mask_k1)
        p_decay = chunk_decay + o_0[:, None] * 0 + o_k[None, :]
        tl.store(p_decay, b_total, mask=(o_0 == 0)[:, None] & mask_k)

        b_own_0, b_own_1 = b_q_0 * b_k_0, b_q_1 * b_k_1
        if BONUS:
            b_bonus = tl.load(bonus + head * K + o_k, mask=o_k < K, other=0.0)[None, :]
            b_own_0, b_own_1 = b_own_0 * b_bonus, b_own_1 * b_bonus
        b_self_0 += tl.sum(b_own_0, axis=1)
        b_self_1 += tl.sum(b_own_1, axis=1)

    diagonal, below = o_0[:, None] == o_0[None, :], o_0[:, None] > o_0[None, :]
    b_score_0 = tl.where(below, b_score_0, tl.where(diagonal, b_self_0[:, None], 0.0))
    b_score_1 = tl.where(below, b_score_1, tl.where(diagonal, b_self_1[:, None], 0.0))
    if PACKED:
        b_score_0 = tl.where(b_document_0[:, None] == b_document_0[None, :], b_score_0, 0.0)
        b_score_1 = tl.where(b_document_1[:, None] == b_document_1[None, :], b_score_1, 0.0)
        b_score_10 = tl.where(b_document_1[:, None] == b_document_0[None, :], b_score_10, 0.0)
    p_score_0 = scores + row * C + o_0[:, None] * C + o_0[None, :]
    p_score_1 = p_score_0 + TILE * C
    tl.store(p_score_0, (b_score_0 * scale).to(dtype), mask=mask_0[:, None])
    tl.store(p_score_0 + TILE, tl.zeros([TILE, TILE], dtype=dtype), mask=mask_0[:, None])
    tl.store(p_score_1, (b_score_10 * scale).to(dtype), mask=mask_1[:, None])
    tl.store(p_score_1 + TILE, (b_score_1 * scale).to(dtype), mask=mask_1[:, None])


@Kernel
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


@Kernel
@triton.jit
def walk_kernel(
    x, w, y, z, scores, chunk_decay, state, key_side, value_side, sums, final, entering, carries,
    T, H, K, V, segment, scale,
    w_stride_b, w_stride_t, w_stride_h, z_stride_b, z_stride_t, z_stride_h,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    PAIRS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What tokens take of the running state Σ y zᵀ: forward S of (y, z) = (k̄, v), read with (x, w)
    = (q̄, do); in reverse dS of (q̄, do), read with (k̄, v).

    VALUES: value_side = x state + scores z: o, or dv.  KEYS: key_side = state w: scale S do, or
    dS v, for what tokens outside the chunk give dq and dk.

    PAIRS: the walk for dq also writes to `scores` their gradient, scale do_t · v_s.

    For dg, the forward walk writes Σ_t q̄_t ⊙ (S do_t) of each chunk's later tile and of the chunk,
    `sums` [B, H, N, 2, K]. The reverse walk takes them, and writes to `carries` [B, H, N, 2, K]
    what pairs of tokens on two sides of a tile give the decays in it. It begins with the pairs on
    two sides of the chunk: <state, its gradient> at the chunk's end, less what the chunk's own
    tokens have in it, and nothing where the chunk lets next to nothing through. A segment of one
    chunk multiplies the two states at its own ends: there a difference would be all rounding.

    Grid: (blocks of K or V, S, B·H). One program owns [BK, BV] of a segment's running state; KEYS
    takes BV >= V, VALUES BK >= K. Reads its inputs once a block, writes its outputs once.
    """
    segment_index, batch, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    block_k, block_v = tl.program_id(0), tl.program_id(0)
    if KEYS:
        block_v *= 0
    else:
        block_k *= 0
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c = tl.arange(0, C)
    o_k, o_v = block_k * BK + tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    mask_kv = mask_k[:, None] & mask_v[None, :]
    w += batch.to(tl.int64) * w_stride_b + head.to(tl.int64) * w_stride_h
    z += batch.to(tl.int64) * z_stride_b + head.to(tl.int64) * z_stride_h
    x += tl.program_id(2).to(tl.int64) * T * K
    y += tl.program_id(2).to(tl.int64) * T * K
    key_side += (batch.to(tl.int64) * T * H + head) * K
    value_side += (batch.to(tl.int64) * T * H + head) * V
    scores += tl.program_id(2).to(tl.int64) * T * C
    chunk_decay += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * K
    sums += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * 2 * K
    carries += tl.program_id(2).to(tl.int64) * tl.cdiv(T, C) * 2 * K
    o_pair = o_c[:, None] * C + o_c[None, :]
    o_transposed = o_c[None, :] * C + o_c[:, None]

    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_kv = o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(state + stretch * K * V + o_kv, mask=mask_kv, other=0.0)
    b_carry = tl.zeros([BK], dtype=tl.float32)
    if KEYS and REVERSE:
        p_other_state = entering + (stretch + H) * K * V
        if segment_index == tl.num_programs(1) - 1:
            p_other_state = final + tl.program_id(2).to(tl.int64) * K * V
        if chunks == 1:
            p_other_state = entering + stretch * K * V
        b_other_state = tl.load(p_other_state + o_kv, mask=mask_kv, other=0.0)
        b_carry = tl.sum(b_state * b_other_state, axis=1)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        mask_c = o_c < T - start
        mask_ck, mask_cv = mask_c[:, None] & mask_k[None, :], mask_c[:, None] & mask_v[None, :]
        o_ck = start.to(tl.int64) * K + o_c[:, None] * K + o_k[None, :]
        p_z = z + start.to(tl.int64) * z_stride_t + o_c[:, None] * z_stride_t + o_v[None, :]
        o_chunk = (start // C).to(tl.int64) * K + o_k
        b_x = tl.load(x + o_ck, mask=mask_ck, other=0.0)
        b_y = tl.load(y + o_ck, mask=mask_ck, other=0.0)
        b_z = tl.load(p_z, mask=mask_cv, other=0.0)
        b_through = tl.exp2(tl.load(chunk_decay + o_chunk, mask=mask_k, other=0.0) * LOG2_E)
        b_rounded = b_state.to(b_z.dtype)
        if KEYS:
            p_w = w + start.to(tl.int64) * w_stride_t + o_c[:, None] * w_stride_t + o_v[None, :]
            b_w = tl.load(p_w, mask=mask_cv, other=0.0)
            # [BK, C]: the state enters from registers.
            b_key_side = tl.dot(b_rounded, tl.trans(b_w), input_precision=PRECISION)
            b_products = tl.trans(b_x) * b_key_side
            # From the state in fp32: the carry loses this in every chunk, and what rounding the
            # state leaves out would add up.
            b_own = tl.dot(tl.trans(b_x), b_w, input_precision=PRECISION)
            b_all = tl.sum(b_state * b_own, axis=1)
            p_key_side = key_side + start.to(tl.int64) * H * K
            p_key_side += o_c[None, :] * (H * K) + o_k[:, None]
            p_sums = sums + 2 * (o_chunk - o_k) + o_k
            if REVERSE:
                p_carries = carries + 2 * (o_chunk - o_k) + o_k
                b_earlier = tl.sum(tl.where((o_c < C // 2)[None, :], b_products, 0.0), axis=1)
                passes = b_through > negligible(PRECISION == "ieee")
                b_across = tl.where(passes, b_carry - b_all, 0.0)
                if chunks == 1:
                    b_across = b_carry * b_through
                b_later_sum = tl.load(p_sums, mask=mask_k, other=0.0)
                tl.store(p_carries, b_across + b_later_sum, mask=mask_k)
                tl.store(p_carries + K, b_across + b_earlier, mask=mask_k)
                b_carry = b_across + tl.load(p_sums + K, mask=mask_k, other=0.0)
            else:
                b_later = tl.sum(tl.where((o_c >= C // 2)[None, :], b_products, 0.0), axis=1)
                tl.store(p_sums, b_later, mask=mask_k)
                tl.store(p_sums + K, b_all, mask=mask_k)
                b_key_side *= scale
                if PAIRS:
                    b_pairs = tl.dot(b_w, tl.trans(b_z), input_precision=PRECISION) * scale
                    p_pairs = scores + start.to(tl.int64) * C + o_pair
                    b_pairs = b_pairs.to(scores.dtype.element_ty)
                    tl.store(p_pairs, b_pairs, mask=mask_c[:, None] & (block_k == 0))
            b_key_side = b_key_side.to(key_side.dtype.element_ty)
            tl.store(p_key_side, b_key_side, mask=mask_k[:, None] & mask_c[None, :])
        if VALUES:
            p_scores = scores + start.to(tl.int64) * C
            if REVERSE:
                b_score = tl.load(p_scores + o_pair, mask=mask_c[:, None], other=0.0)
            else:
                b_score = tl.load(p_scores + o_transposed, mask=mask_c[None, :], other=0.0)
            b_value_side = tl.dot(tl.trans(b_rounded), tl.trans(b_x), input_precision=PRECISION)
            b_value_side = tl.dot(tl.trans(b_z), b_score, b_value_side, input_precision=PRECISION)
            p_value_side = value_side + start.to(tl.int64) * H * V
            p_value_side += o_c[None, :] * (H * V) + o_v[:, None]
            b_value_side = b_value_side.to(value_side.dtype.element_ty)
            tl.store(p_value_side, b_value_side, mask=mask_v[:, None] & mask_c[None, :])
        b_state *= b_through[:, None]
        b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision=PRECISION)


@Kernel
@triton.jit
def score_gradient_kernel(
    do, v, scores,
    T, H, V, scale,
    do_stride_b, do_stride_t, do_stride_h, v_stride_b, v_stride_t, v_stride_h,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the walk for dq writes to `scores`, for values too wide for its registers.

    Grid: (N·H, B). Reads do and v once, writes C numbers a token.
    """
    batch, chunk, head = program_chunk(H)
    start = chunk * C
    o_c = tl.arange(0, C)
    mask_c = (o_c < T - start)[:, None]
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    v += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    do += start.to(tl.int64) * do_stride_t
    v += start.to(tl.int64) * v_stride_t
    b_pairs = tl.zeros([C, C], dtype=tl.float32)
    for first_v in range(0, V, BV):
        o_v = (first_v + tl.arange(0, BV))[None, :]
        b_do = load_tile(do, do_stride_t, o_c[:, None], o_v, mask_c & (o_v < V))
        b_v = load_tile(v, v_stride_t, o_c[:, None], o_v, mask_c & (o_v < V))
        b_pairs = tl.dot(b_do, tl.trans(b_v), b_pairs, input_precision=PRECISION)
    row = (batch.to(tl.int64) * H + head) * T + start
    p_pairs = scores + row * C + o_c[:, None] * C + o_c[None, :]
    tl.store(p_pairs, (b_pairs * scale).to(scores.dtype.element_ty), mask=mask_c)


@triton.jit
def tile_gradient(
    b_q, b_k, b_ds, b_single, b_gradient_spans, o_c,
    EXCLUSIVE: tl.constexpr, LEVELS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """What the pairs in one tile give dq, dk, dg [K, TILE], from the scores' gradient, mirrored at
    the diagonal; the decays from the tile's start, to its end and through it."""
    b_dq = tl.zeros(b_q.shape, dtype=tl.float32)
    b_dk = tl.zeros(b_q.shape, dtype=tl.float32)
    b_dg = tl.zeros(b_q.shape, dtype=tl.float32)
    b_before, b_after, b_block = first_decays(b_single, EXCLUSIVE)
    for level in tl.static_range(LEVELS):
        later = is_later(o_c, level)[None, :]
        b_decay = tl.where(later, b_before, b_after)
        b_side = tl.where(later, b_q, b_k) * b_decay
        b_level = tl.where(level_pairs(o_c, level), b_ds, 0.0).to(dtype)
        b_gradient = tl.dot(b_side.to(dtype), b_level, input_precision=PRECISION)
        b_dg = sum_spans(b_side * b_gradient, b_gradient_spans[level], b_dg, SPLIT)
        b_gradient *= b_decay
        b_dq = tl.where(later, b_dq + b_gradient, b_dq)
        b_dk = tl.where(later, b_dk, b_dk + b_gradient)
        b_before, b_after, b_block = next_decays(
            b_before, b_after, b_block, b_decay, later, 1, level
        )
    return b_dq, b_dk, b_dg, b_before, b_after, b_block


@triton.jit
def load_mirrored(p_pairs, C, o_c, mask_c):
    """A tile's lower triangle with the diagonal, and its mirror image, from rows of C numbers."""
    o_row, o_column = o_c[:, None], o_c[None, :]
    o_first, o_second = tl.maximum(o_row, o_column), tl.minimum(o_row, o_column)
    mask = mask_c[:, None] & mask_c[None, :]
    return tl.load(p_pairs + o_first * C + o_second, mask=mask, other=0.0)


@Kernel
@triton.jit
def pair_gradient_kernel(
    q, k, g, bonus, doc_ids, identity, gradient_spans, score_gradient, carries, outer_dq, dq, dk,
    dg, bonus_gradient,
    T, H, K,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, g_stride_b, g_stride_t,
    g_stride_h,
    TILE: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    FREE_KEYS: tl.constexpr, BONUS: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk from what `walk_kernel` wrote: outer_dq and dk, the tokens outside the chunk, and
    the gradient of the chunk's scores; then dg, and what the chunk gives the bonus.

    q_t ⊙ dq_t and k_s ⊙ dk_s are the gradients of the exponents in the decays on both sides of a
    border: from other tiles of the sums from the tile's start and to its end, and from each level
    of its own spans.

    Grid: (N·H, B). Reads q, k, g, outer_dq, dk and C numbers a token once, writes dq, dk, dg. `_0`
    and `_1` are the chunk's two tiles.
    """
    C: tl.constexpr = 2 * TILE
    batch, chunk_index, head = program_chunk(H)
    start = chunk_index * C
    dtype: tl.constexpr = q.dtype.element_ty
    o_0 = tl.arange(0, TILE)
    o_1 = TILE + o_0
    mask_0, mask_1 = o_0 < T - start, o_1 < T - start
    q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    q += start.to(tl.int64) * q_stride_t
    k += start.to(tl.int64) * k_stride_t
    g += start.to(tl.int64) * g_stride_t
    stream = batch.to(tl.int64) * H + head
    chunk = stream * tl.cdiv(T, C) + chunk_index
    score_gradient += (stream * T + start) * C
    o_out = ((batch.to(tl.int64) * T + start) * H + head) * K
    outer_dq += o_out
    dq += o_out
    dk += o_out
    dg += o_out

    b_ds_0 = load_mirrored(score_gradient, C, o_0, mask_0)
    b_ds_1 = load_mirrored(score_gradient + TILE * C + TILE, C, o_0, mask_1)
    # Queries in 1, keys in 0: for dq [key, query], for dk [query, key].
    p_across = score_gradient + TILE * C
    b_ds_q = tl.load(p_across + o_0[None, :] * C + o_0[:, None], mask=mask_1[None, :], other=0.0)
    b_ds_k = tl.load(p_across + o_0[:, None] * C + o_0[None, :], mask=mask_1[:, None], other=0.0)
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
        before, last = open_documents(doc_ids, start, T, C)
        b_document_0 = documents(doc_ids, start, T, TILE)
        b_document_1 = documents(doc_ids, start + TILE, T, TILE)
        b_ds_0 = tl.where(b_document_0[:, None] == b_document_0[None, :], b_ds_0, 0.0)
        b_ds_1 = tl.where(b_document_1[:, None] == b_document_1[None, :], b_ds_1, 0.0)
        b_ds_q = tl.where(b_document_0[:, None] == b_document_1[None, :], b_ds_q, 0.0)
        b_ds_k = tl.where(b_document_1[:, None] == b_document_0[None, :], b_ds_k, 0.0)
    p_self = score_gradient + o_0 * (C + 1)
    b_self_0 = tl.load(p_self, mask=mask_0, other=0.0).to(tl.float32)
    b_self_1 = tl.load(p_self + TILE * (C + 1), mask=mask_1, other=0.0).to(tl.float32)

    # Everything else is transposed, [K, TILE]: what one product returns enters the next as it is.
    o_pair = o_0[:, None] * TILE + o_0[None, :]
    b_identity = tl.load(identity + o_pair)
    b_gradient_spans = load_spans(gradient_spans, o_pair, LEVELS + 2, TILE)
    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask_k = (o_k < K)[:, None]
        mask_k0, mask_k1 = mask_k & mask_0[None, :], mask_k & mask_1[None, :]
        b_g_0 = load_tile(g, g_stride_t, o_0[None, :], o_k[:, None], mask_k0)
        b_g_1 = load_tile(g, g_stride_t, o_1[None, :], o_k[:, None], mask_k1)
        b_q_0 = load_tile(q, q_stride_t, o_0[None, :], o_k[:, None], mask_k0)
        b_q_1 = load_tile(q, q_stride_t, o_1[None, :], o_k[:, None], mask_k1)
        if not FREE_KEYS:
            b_k_0 = load_tile(k, k_stride_t, o_0[None, :], o_k[:, None], mask_k0)
            b_k_1 = load_tile(k, k_stride_t, o_1[None, :], o_k[:, None], mask_k1)
        b_outer_q0 = load_tile(outer_dq, H * K, o_0[None, :], o_k[:, None], mask_k0)
        b_outer_q1 = load_tile(outer_dq, H * K, o_1[None, :], o_k[:, None], mask_k1)
        b_outer_k0 = load_tile(dk, H * K, o_0[None, :], o_k[:, None], mask_k0)
        b_outer_k1 = load_tile(dk, H * K, o_1[None, :], o_k[:, None], mask_k1)
        b_summands_0 = summands(b_g_0, PRECISION == "ieee")
        b_summands_1 = summands(b_g_1, PRECISION == "ieee")
        b_single_0 = tl.exp2(tl.dot(b_summands_0, b_identity, input_precision="ieee"))
        b_single_1 = tl.exp2(tl.dot(b_summands_1, b_identity, input_precision="ieee"))
        b_q_0, b_q_1 = b_q_0.to(tl.float32), b_q_1.to(tl.float32)
        if FREE_KEYS:
            b_k_0, b_k_1 = free_part(b_g_0, b_single_0), free_part(b_g_1, b_single_1)
        else:
            b_k_0, b_k_1 = b_k_0.to(tl.float32), b_k_1.to(tl.float32)
        b_dq_0, b_dk_0, b_dg_0, b_before_0, b_after_0, b_through_0 = tile_gradient(
            b_q_0, b_k_0, b_ds_0, b_single_0, b_gradient_spans, o_0, BONUS, LEVELS, SPLIT,
            PRECISION, dtype,
        )  # fmt: skip
        b_dq_1, b_dk_1, b_dg_1, b_before_1, b_after_1, b_through_1 = tile_gradient(
            b_q_1, b_k_1, b_ds_1, b_single_1, b_gradient_spans, o_0, BONUS, LEVELS, SPLIT,
            PRECISION, dtype,
        )  # fmt: skip
        b_outer_q1, b_outer_k0 = b_outer_q1 * b_through_0, b_outer_k0 * b_through_1
        if PACKED:
            b_outer_q0 = tl.where((b_document_0 == before)[None, :], b_outer_q0, 0.0)
            b_outer_q1 = tl.where((b_document_1 == before)[None, :], b_outer_q1, 0.0)
            b_outer_k0 = tl.where((b_document_0 == last)[None, :], b_outer_k0, 0.0)
            b_outer_k1 = tl.where((b_document_1 == last)[None, :], b_outer_k1, 0.0)
        b_near_k, b_near_q = (b_k_0 * b_after_0).to(dtype), (b_q_1 * b_before_1).to(dtype)
        b_outer_q1 = tl.dot(b_near_k, b_ds_q, b_outer_q1, input_precision=PRECISION)
        b_outer_k0 = tl.dot(b_near_q, b_ds_k, b_outer_k0, input_precision=PRECISION)
        b_outer_q0, b_outer_q1 = b_outer_q0 * b_before_0, b_outer_q1 * b_before_1
        b_outer_k0, b_outer_k1 = b_outer_k0 * b_after_0, b_outer_k1 * b_after_1
        b_dq_0, b_dq_1 = b_dq_0 + b_outer_q0, b_dq_1 + b_outer_q1
        b_dk_0, b_dk_1 = b_dk_0 + b_outer_k0, b_dk_1 + b_outer_k1
        b_span_before, b_span_after = b_gradient_spans[LEVELS], b_gradient_spans[LEVELS + 1]
        b_dg_0 = sum_spans(b_q_0 * b_outer_q0, b_span_before, b_dg_0, SPLIT)
        b_dg_0 = sum_spans(b_k_0 * b_outer_k0, b_span_after, b_dg_0, SPLIT)
        b_dg_1 = sum_spans(b_q_1 * b_outer_q1, b_span_before, b_dg_1, SPLIT)
        b_dg_1 = sum_spans(b_k_1 * b_outer_k1, b_span_after, b_dg_1, SPLIT)
        p_carries = carries + chunk * 2 * K + o_k
        b_dg_0 += tl.load(p_carries, mask=o_k < K, other=0.0)[:, None]
        b_dg_1 += tl.load(p_carries + K, mask=o_k < K, other=0.0)[:, None]
        b_self_q0, b_self_k0 = b_self_0[None, :] * b_q_0, b_self_0[None, :] * b_k_0
        b_self_q1, b_self_k1 = b_self_1[None, :] * b_q_1, b_self_1[None, :] * b_k_1
        if BONUS:
            b_du = tl.sum(b_self_q0 * b_k_0 + b_self_q1 * b_k_1, axis=1)
            tl.store(bonus_gradient + chunk * K + o_k, b_du, mask=o_k < K)
            b_bonus = tl.load(bonus + head * K + o_k, mask=o_k < K, other=0.0)[:, None]
            b_self_q0, b_self_k0 = b_self_q0 * b_bonus, b_self_k0 * b_bonus
            b_self_q1, b_self_k1 = b_self_q1 * b_bonus, b_self_k1 * b_bonus
        b_dq_0, b_dk_0 = b_dq_0 + b_self_k0, b_dk_0 + b_self_q0
        b_dq_1, b_dk_1 = b_dq_1 + b_self_k1, b_dk_1 + b_self_q1
        p_0 = o_0[None, :] * (H * K) + o_k[:, None]
        p_1 = o_1[None, :] * (H * K) + o_k[:, None]
        if FREE_KEYS:
            b_dg_0 -= b_dk_0 * b_single_0
            b_dg_1 -= b_dk_1 * b_single_1
        else:
            tl.store(dk + p_0, b_dk_0.to(dtype), mask=mask_k0)
            tl.store(dk + p_1, b_dk_1.to(dtype), mask=mask_k1)
        tl.store(dq + p_0, b_dq_0.to(dtype), mask=mask_k0)
        tl.store(dq + p_1, b_dq_1.to(dtype), mask=mask_k1)
        tl.store(dg + p_0, b_dg_0.to(dg.dtype.element_ty), mask=mask_k0)
        tl.store(dg + p_1, b_dg_1.to(dg.dtype.element_ty), mask=mask_k1)
