"""Kernels of Kimi delta attention, forward and backward.

With G the running sum of the gates in a chunk and S the state that enters it, what a token finds
wrong in the state, its residual r_t = v_t - S_{t-1}ᵀ (exp(g_t) k_t), solves a unit lower triangular
system (the WY form, arXiv:2406.06484):

    q̂_t = scale exp(G_t) q_t    k̂_t = exp(G_t) k_t    k̄_s = beta_s exp(G_C - G_s) k_s
    N_ts = Σ_K exp(G_t - G_s) k_t k_s for s < t    A_ts = scale beta_s Σ_K exp(G_t - G_s) q_t k_s

    R = V - K̂ S        r = R + Y R        o = q̂ S + A r        S' = diag(exp G_C) S + k̄ᵀ r

with one strictly lower triangular matrix Y = (1 + N beta)⁻¹ - 1, which serves the gradient, too:

    E = Aᵀ do + k̄ dS'    dv = dR = E + Yᵀ E    dS = diag(exp G_C) dS' + q̂ᵀ do - K̂ᵀ dv

`prepare_kernel` computes the first two lines and Y, so that what walks the chunks of a segment sees
neither gates nor documents nor beta. `value_walk_kernel` and `value_gradient_kernel` hold blocks of
V of the states and compute the next two lines; `query_walk_kernel` and `key_walk_kernel` hold
blocks of K of the same states and compute what tokens outside a chunk give its q and k.
`pair_gradient_kernel` adds what the pairs inside a chunk give them,

    P_ts = scale do_t·r_s for q_t and beta_s k_s, s <= t
    X_ts = -dv_t·r_s      for k_t and beta_s k_s, s < t

and computes dg and dbeta. beta_s is nowhere but in beta_s k_s, whose gradient times k_s is dbeta_s.

Inside a chunk the decay differs by channel: pairs are sorted by levels, as in
kernels/gla/triton_kernels.py.

Notation: B batch, T tokens, H heads, K and V head sizes, C tokens a chunk, N chunks, S segments.
q, k, v, g, o, r and gradients are [B, T, H, ·], their last axis contiguous; q̂, -K̂, k̄ [B, H, T, K];
Y and A [B, H, T, C]; what the walks give a chunk's q and k [B, H, N, K, C]; states [B, S, H, K, V]
and transitions [B, S, H, K, K] fp32; `through`, the decay over each chunk, [B, H, N, K] fp32.
`b_*` blocks in registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.

A running state is the first factor of every product it is in, and so is what follows from it:
first factors come from registers, second ones from shared memory, where loads have put them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.levels import (
    chunk_documents,
    first_decays,
    is_later,
    level_pairs,
    load_spans,
    next_decays,
    program_chunk,
    summands,
)
from fla_dist.kernels.common.segments import negligible
from fla_dist.kernels.gated_delta_rule.triton_kernels import (
    load_pairs,
    load_tile,
    unscaled_inverse,
)


@triton.jit
def product_in_parts(b_x, b_y, b_sum, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum + x y for an fp32 x: in two parts of y's type, so that x is hardly rounded, or in one.
    The first part is x without the bits that y's type does not hold: a mask is faster than a
    conversion there and back."""
    if PARTS == 2:
        KEPT: tl.constexpr = -65536 if b_y.dtype == tl.bfloat16 else -8192
        b_part = (b_x.to(tl.int32, bitcast=True) & KEPT).to(tl.float32, bitcast=True)
        b_rest = (b_x - b_part).to(b_y.dtype)
        b_sum = tl.dot(b_rest, b_y, b_sum, input_precision=PRECISION)
    else:
        b_part = b_x
    return tl.dot(b_part.to(b_y.dtype), b_y, b_sum, input_precision=PRECISION)


@Kernel
@triton.jit
def prepare_kernel(
    q, k, g, beta, doc_ids, identity, q_in, k_in, k_out, through, scores, inverse,
    T, H, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q̂, -K̂ and k̄, zero where a document keeps the token from the chunk's start or its end; the
    decay over the chunk, zero where a document starts in it; A and Y.

    Grid: (N·H, B). Reads q, k, g once, writes as much and 2 C numbers a token.
    """
    batch, chunk, head = program_chunk(H)
    row, start = batch * H + head, chunk * C
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    beta += batch.to(tl.int64) * beta_stride_b + head.to(tl.int64) * beta_stride_h
    first = row.to(tl.int64) * T + start
    through += (row.to(tl.int64) * tl.cdiv(T, C) + chunk) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
    p_beta = beta + start.to(tl.int64) * beta_stride_t + o_c * beta_stride_t
    b_beta = tl.load(p_beta, mask=mask_c, other=0.0).to(tl.float32)
    o_pair = o_c[:, None] * C + o_c[None, :]

    b_identity = tl.load(identity + o_pair)
    b_score, b_keys = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    b_self = tl.zeros([C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask_k = (o_k < K)[None, :]
        mask = mask_c[:, None] & mask_k
        b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_g = load_tile(g, start, T, g_stride_t, o_k, K, C)
        dtype: tl.constexpr = q.dtype.element_ty
        # Nothing is summed here, but what comes is in the products' layout.
        b_summands = summands(b_g, PRECISION == "ieee")
        b_single = tl.exp2(tl.dot(b_identity, b_summands, input_precision="ieee"))
        b_q, b_k = b_single * 0 + b_q, b_single * 0 + b_k
        b_self += tl.sum(b_q * b_k, axis=1)
        b_before, b_after, b_block = first_decays(b_single, False)
        for level in tl.static_range(LEVELS):
            later = is_later(o_c, level)[:, None]
            b_decay = tl.where(later, b_before, b_after)
            b_query, b_key = (b_q * b_decay).to(dtype), b_k * b_decay
            b_earlier, b_key = tl.trans(b_key).to(dtype), b_key.to(dtype)
            b_pairs = level_pairs(o_c, level)
            b_product = tl.dot(b_query, b_earlier, input_precision=PRECISION)
            b_score += tl.where(b_pairs, b_product, 0.0)
            b_product = tl.dot(b_key, b_earlier, input_precision=PRECISION)
            b_keys += tl.where(b_pairs, b_product, 0.0)
            b_before, b_after, b_block = next_decays(
                b_before, b_after, b_block, b_decay, later, 0, level
            )

        if PACKED:
            b_before = tl.where(b_continues[:, None], b_before, 0.0)
            b_after = tl.where(b_last[:, None], b_after, 0.0)
            b_block = tl.where(passes, b_block, 0.0)
        b_in, b_held, b_out = (
            b_q * b_before * scale,
            b_k * -b_before,
            b_k * b_after * b_beta[:, None],
        )
        o_ck = (first + o_c[:, None]) * K + o_k[None, :]
        tl.store(q_in + o_ck, b_in.to(q_in.dtype.element_ty), mask=mask)
        tl.store(k_in + o_ck, b_held.to(k_in.dtype.element_ty), mask=mask)
        tl.store(k_out + o_ck, b_out.to(k_out.dtype.element_ty), mask=mask)
        p_through = through + o_c[:, None] * 0 + o_k[None, :]
        tl.store(p_through, b_block, mask=(o_c == 0)[:, None] & mask_k)

    b_score = tl.where(o_c[:, None] == o_c[None, :], b_self[:, None], b_score)
    visible = o_c[:, None] >= o_c[None, :]
    if PACKED:
        visible = visible & (b_document[:, None] == b_document[None, :])
    b_score = tl.where(visible, b_score * b_beta[None, :] * scale, 0.0)
    b_keys = tl.where(visible & (o_c[:, None] > o_c[None, :]), b_keys, 0.0)
    b_y = unscaled_inverse(b_keys, b_beta, C, PRECISION) * b_beta[None, :]
    o_pair = first * C + o_pair
    tl.store(scores + o_pair, b_score.to(scores.dtype.element_ty), mask=mask_c[:, None])
    tl.store(inverse + o_pair, b_y.to(inverse.dtype.element_ty), mask=mask_c[:, None])


@Kernel
@triton.jit
def value_walk_kernel(
    q_in, k_in, k_out, v, through, inverse, scores, entering, leaving, transition, out, residual,
    T, H, segment, v_stride_b, v_stride_t, v_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SUMMARIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence over a segment's chunks. SUMMARIZE: from a state of zero, and on the columns
    of the identity without values; writes the state and the transition that the segment ends in.
    Otherwise from the entering state; writes o, r, and the state after the last segment.

    Grid: (blocks of V, and of K for the transition, S, B·H). One program owns [BV, BK >= K] of the
    transposed state. Reads -K̂, k̄ and Y once a block (and q̂ and A), v once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    v += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    k_in += row.to(tl.int64) * T * K
    k_out += row.to(tl.int64) * T * K
    inverse += row.to(tl.int64) * T * C
    through += row.to(tl.int64) * tl.cdiv(T, C) * K
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_state = o_k[None, :] * V + o_v[:, None]
    mask_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    o_column = o_v - tl.cdiv(V, BV) * BV  # of the identity; negative in a block of values
    if SUMMARIZE:
        b_state = tl.where(o_column[:, None] == o_k[None, :], 1.0, 0.0)
    else:
        q_in += row.to(tl.int64) * T * K
        scores += row.to(tl.int64) * T * C
        out += (batch.to(tl.int64) * T * H + head) * V
        residual += (batch.to(tl.int64) * T * H + head) * V
        b_state = tl.load(entering + stretch * K * V + o_state, mask=mask_state, other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + i * C
        b_held = load_tile(k_in, start, T, K, o_k, K, C)
        b_written = load_tile(k_out, start, T, K, o_k, K, C)
        b_v = tl.trans(load_tile(v, start, T, v_stride_t, o_v, V, C))  # [BV, C]
        b_y = load_pairs(inverse, start, T, C)
        p_through = through + (start // C).to(tl.int64) * K + o_k
        b_through = tl.load(p_through, mask=o_k < K, other=0.0)[None, :]
        b_factor = b_state.to(b_held.dtype)
        b_r = tl.dot(b_factor, tl.trans(b_held), b_v.to(tl.float32), input_precision=PRECISION)
        b_r = tl.dot(b_r.to(b_held.dtype), tl.trans(b_y), b_r, input_precision=PRECISION)
        b_kept = b_r.to(b_held.dtype)
        if not SUMMARIZE:
            b_q = load_tile(q_in, start, T, K, o_k, K, C)
            b_scores = load_pairs(scores, start, T, C)
            b_out = tl.dot(b_factor, tl.trans(b_q), input_precision=PRECISION)
            b_out = tl.dot(b_kept, tl.trans(b_scores), b_out, input_precision=PRECISION)
            o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
            mask = (o_c < T - start)[None, :] & (o_v < V)[:, None]
            tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=mask)
            tl.store(residual + o_out, b_kept, mask=mask)
        b_state = tl.dot(b_kept, b_written, b_state * b_through, input_precision=PRECISION)

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
    q_in, k_in, k_out, do, through, inverse, scores, leaving_gradient, entering_gradient, dv,
    T, H, segment, do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SUMMARIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient over a segment's chunks, from the last. SUMMARIZE: from zero; writes
    what the segment begins with. Otherwise from that of the leaving state; writes dv, and the
    gradient of the first segment's entering state.

    Grid: (blocks of V, S, B·H). One program owns [BV, BK >= K] of the transposed gradient. Reads
    q̂, -K̂, k̄, Y and A once a block, do once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    q_in += row.to(tl.int64) * T * K
    k_in += row.to(tl.int64) * T * K
    k_out += row.to(tl.int64) * T * K
    inverse += row.to(tl.int64) * T * C
    scores += row.to(tl.int64) * T * C
    through += row.to(tl.int64) * tl.cdiv(T, C) * K
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_state = o_k[None, :] * V + o_v[:, None]
    mask_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    if SUMMARIZE:
        b_gradient = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        dv += (batch.to(tl.int64) * T * H + head) * V
        p_state = leaving_gradient + stretch * K * V + o_state
        b_gradient = tl.load(p_state, mask=mask_state, other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i) * C
        b_q = load_tile(q_in, start, T, K, o_k, K, C)
        b_held = load_tile(k_in, start, T, K, o_k, K, C)
        b_written = load_tile(k_out, start, T, K, o_k, K, C)
        b_do = tl.trans(load_tile(do, start, T, do_stride_t, o_v, V, C))  # [BV, C]
        b_y = load_pairs(inverse, start, T, C)
        b_scores = load_pairs(scores, start, T, C)
        p_through = through + (start // C).to(tl.int64) * K + o_k
        b_through = tl.load(p_through, mask=o_k < K, other=0.0)[None, :]
        b_dv = tl.dot(b_gradient.to(b_q.dtype), tl.trans(b_written), input_precision=PRECISION)
        b_dv = tl.dot(b_do, b_scores, b_dv, input_precision=PRECISION)
        b_gradient *= b_through
        b_gradient = tl.dot(b_do, b_q, b_gradient, input_precision=PRECISION)
        b_dv = tl.dot(b_dv.to(b_q.dtype), b_y, b_dv, input_precision=PRECISION)
        b_kept = b_dv.to(b_q.dtype)
        if not SUMMARIZE:
            o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
            mask = (o_c < T - start)[None, :] & (o_v < V)[:, None]
            tl.store(dv + o_out, b_kept, mask=mask)
        b_gradient = tl.dot(b_kept, b_held, b_gradient, input_precision=PRECISION)

    if SUMMARIZE:
        tl.store(entering_gradient + stretch * K * V + o_state, b_gradient, mask=mask_state)
    else:
        if segment_index == 0:
            p_state = entering_gradient + row.to(tl.int64) * K * V + o_state
            tl.store(p_state, b_gradient, mask=mask_state)


@Kernel
@triton.jit
def query_walk_kernel(
    q_in, k_in, k_out, do, dv, residual, through, entering, dq_in, dk_in, chunk_sums,
    T, H, segment, do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q̂, S do, and of -K̂, S dv; and what both give the decay from the chunk's
    start, summed over the chunk [B, H, N, K]: <S, what they add to the state's gradient>, of the S
    and the sum in fp32, so that nothing is left of it where `key_walk_kernel` subtracts it.

    Grid: (blocks of K, S, B·H). One program owns [BK, BV >= V] of a segment's running state. Reads
    do, dv and r once a block, q̂, -K̂ and k̄ once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), block * BK + tl.arange(0, BK), tl.arange(0, BV)
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    dv += (batch.to(tl.int64) * T * H + head) * V
    residual += (batch.to(tl.int64) * T * H + head) * V
    q_in += row.to(tl.int64) * T * K
    k_in += row.to(tl.int64) * T * K
    k_out += row.to(tl.int64) * T * K
    first_chunk = row.to(tl.int64) * tl.cdiv(T, C)
    through += first_chunk * K
    chunk_sums += first_chunk * K
    dq_in += first_chunk * K * C
    dk_in += first_chunk * K * C
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = entering + stretch * K * V + o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(p_state, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + i * C
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_r = load_tile(residual, start, T, H * V, o_v, V, C)
        b_q = tl.trans(load_tile(q_in, start, T, K, o_k, K, C))  # [BK, C]
        b_held = tl.trans(load_tile(k_in, start, T, K, o_k, K, C))
        b_written = tl.trans(load_tile(k_out, start, T, K, o_k, K, C))
        o_chunk = (start // C).to(tl.int64) * K + o_k
        b_through = tl.load(through + o_chunk, mask=o_k < K, other=0.0)
        b_factor = b_state.to(b_do.dtype)
        b_dq = tl.dot(b_factor, tl.trans(b_do), input_precision=PRECISION)
        b_dk = tl.dot(b_factor, tl.trans(b_dv), input_precision=PRECISION)
        b_added = tl.dot(b_q, b_do, input_precision=PRECISION)
        b_added = tl.dot(b_held, b_dv, b_added, input_precision=PRECISION)
        tl.store(chunk_sums + o_chunk, tl.sum(b_state * b_added, axis=1), mask=o_k < K)
        o_out = o_chunk[:, None] * C + o_c[None, :]
        mask = (o_k < K)[:, None] & (o_c < C)[None, :]
        tl.store(dq_in + o_out, b_dq.to(dq_in.dtype.element_ty), mask=mask)
        tl.store(dk_in + o_out, b_dk.to(dk_in.dtype.element_ty), mask=mask)
        b_state *= b_through[:, None]
        b_state = tl.dot(b_written, b_r, b_state, input_precision=PRECISION)


@Kernel
@triton.jit
def key_walk_kernel(
    q_in, k_in, k_out, do, dv, residual, through, entering, final, leaving_gradient, chunk_sums,
    dk_out, across,
    T, H, segment, do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of k̄, dS' r; and `across` [B, H, N, K], what pairs with one token before a chunk
    and one after it give the decays in it: <state, its gradient> at the chunk's end, less what the
    chunk's own tokens have in it, and nothing where the chunk lets next to nothing through.

    Grid: (blocks of K, S, B·H). One program owns [BK, BV >= V] of the state's gradient. Reads do,
    dv and r once a block, q̂, -K̂ and k̄ once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), block * BK + tl.arange(0, BK), tl.arange(0, BV)
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    dv += (batch.to(tl.int64) * T * H + head) * V
    residual += (batch.to(tl.int64) * T * H + head) * V
    q_in += row.to(tl.int64) * T * K
    k_in += row.to(tl.int64) * T * K
    k_out += row.to(tl.int64) * T * K
    first_chunk = row.to(tl.int64) * tl.cdiv(T, C)
    through += first_chunk * K
    chunk_sums += first_chunk * K
    across += first_chunk * K
    dk_out += first_chunk * K * C
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_state = o_k[:, None] * V + o_v[None, :]
    mask_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_gradient = tl.load(leaving_gradient + stretch * K * V + o_state, mask=mask_state, other=0.0)
    leaving = entering + (stretch + H) * K * V
    if segment_index == tl.num_programs(1) - 1:
        leaving = final + row.to(tl.int64) * K * V
    b_carry = b_gradient * tl.load(leaving + o_state, mask=mask_state, other=0.0)
    b_carry = tl.sum(b_carry, axis=1)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i) * C
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_r = load_tile(residual, start, T, H * V, o_v, V, C)
        b_q = tl.trans(load_tile(q_in, start, T, K, o_k, K, C))  # [BK, C]
        b_held = tl.trans(load_tile(k_in, start, T, K, o_k, K, C))
        b_written = tl.trans(load_tile(k_out, start, T, K, o_k, K, C))
        o_chunk = (start // C).to(tl.int64) * K + o_k
        b_through = tl.load(through + o_chunk, mask=o_k < K, other=0.0)
        b_sums = tl.load(chunk_sums + o_chunk, mask=o_k < K, other=0.0)
        b_dk = tl.dot(b_gradient.to(b_do.dtype), tl.trans(b_r), input_precision=PRECISION)
        b_added = tl.dot(b_written, b_r, input_precision=PRECISION)
        b_rest = b_carry - tl.sum(b_gradient * b_added, axis=1)
        b_across = tl.where(b_through > negligible(PRECISION == "ieee"), b_rest, 0.0)
        tl.store(across + o_chunk, b_across, mask=o_k < K)
        b_carry = b_across + b_sums
        o_out = o_chunk[:, None] * C + o_c[None, :]
        mask = (o_k < K)[:, None] & (o_c < C)[None, :]
        tl.store(dk_out + o_out, b_dk.to(dk_out.dtype.element_ty), mask=mask)
        b_gradient *= b_through[:, None]
        b_gradient = tl.dot(b_q, b_do, b_gradient, input_precision=PRECISION)
        b_gradient = tl.dot(b_held, b_dv, b_gradient, input_precision=PRECISION)


@Kernel
@triton.jit
def pair_gradient_kernel(
    q, k, g, beta, do, dv, residual, doc_ids, identity, gradient_spans, dq_in, dk_in, dk_out,
    across, dq, dk, dg, dbeta,
    T, H, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PACKED: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg and dbeta of a chunk: what the walks gave them (`dq_in`, `dk_in`, `dk_out`,
    `across`), and the pairs inside.

    A token has one matrix a level for q and one for k: as the later one of a pair it enters with
    q_t or k_t, as the earlier one with beta_s k_s. P and X are mirrored at the diagonal, so that
    one product a matrix gives both sides their gradients.

    Grid: (N·H, B). Reads q, k, g, do, dv, r and the walks' three once, writes dq, dk, dg.
    """
    batch, chunk, head = program_chunk(H)
    row, start = batch * H + head, chunk * C
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    g += batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    beta += batch.to(tl.int64) * beta_stride_b + head.to(tl.int64) * beta_stride_h
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    dv += (batch.to(tl.int64) * T * H + head) * V
    residual += (batch.to(tl.int64) * T * H + head) * V
    o_chunk = (row.to(tl.int64) * tl.cdiv(T, C) + chunk) * K
    o_out = ((batch.to(tl.int64) * T + start) * H + head) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, _ = chunk_documents(doc_ids, start, T, C, PACKED)
    p_beta = beta + start.to(tl.int64) * beta_stride_t + o_c * beta_stride_t
    b_beta = tl.load(p_beta, mask=mask_c, other=0.0).to(tl.float32)

    b_query_pairs = tl.zeros([C, C], dtype=tl.float32)
    b_key_pairs = tl.zeros([C, C], dtype=tl.float32)
    for first_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = first_v + tl.arange(0, BV)
        b_r = tl.trans(load_tile(residual, start, T, H * V, o_v, V, C))
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_query_pairs = tl.dot(b_do, b_r, b_query_pairs, input_precision=PRECISION)
        b_key_pairs = tl.dot(b_dv, b_r, b_key_pairs, input_precision=PRECISION)
    b_visible = o_c[:, None] > o_c[None, :]
    if PACKED:
        b_visible = b_visible & (b_document[:, None] == b_document[None, :])
    b_query_pairs *= scale
    b_self = tl.where(o_c[:, None] == o_c[None, :], b_query_pairs, 0.0)
    b_self = tl.sum(b_self, axis=0)[None, :]
    b_query_pairs = tl.where(b_visible, b_query_pairs, 0.0)
    b_key_pairs = tl.where(b_visible, -b_key_pairs, 0.0)
    b_query_pairs = (b_query_pairs + tl.trans(b_query_pairs)).to(do.dtype.element_ty)
    b_key_pairs = (b_key_pairs + tl.trans(b_key_pairs)).to(do.dtype.element_ty)

    # Everything else is transposed, [K, C]: what one product returns enters the next as it is.
    o_pair = o_c[:, None] * C + o_c[None, :]
    b_identity = tl.load(identity + o_pair)
    b_gradient_spans = load_spans(gradient_spans, o_pair, LEVELS + 2, C)
    b_dbeta = tl.zeros([C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask_k = o_k < K
        b_q = tl.trans(load_tile(q, start, T, q_stride_t, o_k, K, C)).to(tl.float32)
        b_k = tl.trans(load_tile(k, start, T, k_stride_t, o_k, K, C)).to(tl.float32)
        b_summands = summands(
            tl.trans(load_tile(g, start, T, g_stride_t, o_k, K, C)), PRECISION == "ieee"
        )
        o_given = (o_chunk + o_k)[:, None] * C + o_c[None, :]
        mask_given = mask_k[:, None] & (o_c < C)[None, :]
        b_outer_q = tl.load(dq_in + o_given, mask=mask_given, other=0.0)
        b_outer_k = tl.load(dk_in + o_given, mask=mask_given, other=0.0)
        b_outer_w = tl.load(dk_out + o_given, mask=mask_given, other=0.0)
        b_single = tl.exp2(tl.dot(b_summands, b_identity, input_precision="ieee"))
        b_written = b_k * b_beta[None, :]
        b_dg = tl.zeros([BK, C], dtype=tl.float32)
        b_dq, b_dk, b_dw = b_self * b_written, tl.zeros([BK, C], dtype=tl.float32), b_self * b_q
        b_before, b_after, b_block = first_decays(b_single, False)
        for level in tl.static_range(LEVELS):
            later = is_later(o_c, level)[None, :]
            b_decay = tl.where(later, b_before, b_after)
            b_query = tl.where(later, b_q, b_written) * b_decay
            b_key = tl.where(later, b_k, b_written) * b_decay
            b_pairs = level_pairs(o_c, level)
            b_level = tl.trans(tl.where(b_pairs, b_query_pairs, 0.0))
            b_query_given = tl.dot(b_query.to(b_level.dtype), b_level, input_precision=PRECISION)
            b_level = tl.trans(tl.where(b_pairs, b_key_pairs, 0.0))
            b_key_given = tl.dot(b_key.to(b_level.dtype), b_level, input_precision=PRECISION)
            b_change = b_query * b_query_given + b_key * b_key_given
            b_dg = product_in_parts(b_change, b_gradient_spans[level], b_dg, PARTS, "ieee")
            b_query_given *= b_decay
            b_key_given *= b_decay
            b_dq = tl.where(later, b_dq + b_query_given, b_dq)
            b_dk = tl.where(later, b_dk + b_key_given, b_dk)
            b_dw = tl.where(later, b_dw, b_dw + b_query_given + b_key_given)
            b_before, b_after, b_block = next_decays(
                b_before, b_after, b_block, b_decay, later, 1, level
            )

        if PACKED:
            b_before = tl.where(b_continues[None, :], b_before, 0.0)
            b_after = tl.where(b_last[None, :], b_after, 0.0)
        b_query_given = b_outer_q * (b_before * scale)
        b_key_given = b_outer_k * -b_before
        b_written_given = b_outer_w * b_after
        b_dq, b_dk, b_dw = b_dq + b_query_given, b_dk + b_key_given, b_dw + b_written_given
        b_change = b_q * b_query_given + b_k * b_key_given
        b_dg = product_in_parts(b_change, b_gradient_spans[LEVELS], b_dg, PARTS, "ieee")
        b_change = b_written * b_written_given
        b_dg = product_in_parts(b_change, b_gradient_spans[LEVELS + 1], b_dg, PARTS, "ieee")
        b_dg += tl.load(across + o_chunk + o_k, mask=mask_k, other=0.0)[:, None]
        b_dbeta += tl.sum(b_k * b_dw, axis=0)
        b_dk += b_beta[None, :] * b_dw
        p_out = o_out + o_k[:, None] + o_c[None, :] * (H * K)
        mask = mask_k[:, None] & mask_c[None, :]
        tl.store(dg + p_out, b_dg.to(dg.dtype.element_ty), mask=mask)
        tl.store(dq + p_out, b_dq.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + p_out, b_dk.to(dk.dtype.element_ty), mask=mask)
    p_dbeta = dbeta + (batch.to(tl.int64) * T + start + o_c) * H + head
    tl.store(p_dbeta, b_dbeta, mask=mask_c)
