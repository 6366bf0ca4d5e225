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

The forward keeps d, so that the backward's states are the forward's to the bit; where β is 0, it
keeps r in its place (`written`), which dβ needs.

Notation: B batch, T tokens, H value heads, K and V head sizes, C tokens a chunk, N chunks, S
segments; key head h // group serves value head h. q, k, v, o, d and gradients [B, T, H, ·], their
last axis contiguous; what a chunk's pairs have (Y, scores, P, X + Xᵀ) [B, H, T, C]; states
[B, S, H, K, V] and transitions [B, S, H, K, K] fp32. `weights` [4, B, H, T] fp32: G in log2, the
decay since the chunk's start and until its end, β; the decays are 0 where a document start lies
between. `through` [B, H, N]: the decay over a whole chunk. `b_*` blocks in registers, `p_*`
pointers, `o_*` offsets. A document reaches across chunks as kernels/common/documents.py says.

A running state is the first factor of every product it is in, and so is what follows from it:
first factors come from registers, second ones from shared memory, where loads have put them. No
product of a walk waits for a store to shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.segments import negligible
from fla_dist.kernels.simple_gla.triton_kernels import TOKEN_DECAY, chunk_decay, pair_decay

LOG_DECAY: tl.constexpr = tl.constexpr(0)
FROM_START: tl.constexpr = tl.constexpr(1)
TO_END: tl.constexpr = tl.constexpr(2)
BETA: tl.constexpr = tl.constexpr(3)


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
def load_weight(weights, KIND: tl.constexpr, start, T, C: tl.constexpr):
    """[C] of the chunk at `start`, 0 beyond T; weights points to the sequence's first token."""
    o_c = tl.arange(0, C)
    p_weight = weights + KIND * (tl.num_programs(2).to(tl.int64) * T) + start + o_c
    return tl.load(p_weight, mask=o_c < T - start, other=0.0)


@triton.jit
def writes(weights, start, T, C: tl.constexpr):
    """[C]: 1 where what the forward kept of a token is d, 0 where β is 0 and it is r."""
    return tl.where(load_weight(weights, BETA, start, T, C) == 0, 0.0, 1.0)


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
    p_beta = beta + start.to(tl.int64) * beta_stride_t + o_c * beta_stride_t
    b_beta = tl.load(p_beta, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(p_weight + BETA * plane, b_beta, mask=mask_c)

    b_keys = tl.zeros([C, C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=1):
        b_k = load_tile(k, start, T, k_stride_t, first_k + tl.arange(0, BK), K, C)
        b_keys = tl.dot(b_k, tl.trans(b_k), b_keys, input_precision=PRECISION)
    if DECAY:
        b_sum, b_document, b_from_start, b_to_end, b_through = chunk_decay(
            g, doc_ids, start, T, g_stride_t, 0.0, C, GATES, PACKED
        )
        tl.store(p_weight + LOG_DECAY * plane, b_sum, mask=mask_c)
        tl.store(p_weight + FROM_START * plane, b_from_start, mask=mask_c)
        tl.store(p_weight + TO_END * plane, b_to_end, mask=mask_c)
        tl.store(through + row * tl.num_programs(0) + chunk, b_through)
        b_decay = pair_decay(b_sum, b_document, C, PACKED, False)
    else:
        b_decay = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)

    o_pairs = (row.to(tl.int64) * T + start) * C + o_c[:, None] * C + o_c[None, :]
    b_scores = tl.zeros([C, C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=1):
        o_k = first_k + tl.arange(0, BK)
        b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision=PRECISION)
    b_scores *= b_decay * scale
    tl.store(scores + o_pairs, b_scores.to(scores.dtype.element_ty), mask=mask_c[:, None])
    b_n = tl.where(o_c[:, None] > o_c[None, :], b_keys * b_decay, 0.0)
    b_y = unscaled_inverse(b_n, b_beta, C, PRECISION)
    tl.store(inverse + o_pairs, b_y.to(inverse.dtype.element_ty), mask=mask_c[:, None])


@triton.jit
def value_walk_kernel(
    q, k, v, weights, through, inverse, scores, entering, leaving, transition, out, written,
    T, H, group, segment, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, SUMMARIZE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence over a segment's chunks. SUMMARIZE: from a state of zero, and on the columns
    of the identity without values; writes the state and the transition that the segment ends in.
    Otherwise from the entering state; writes o, d, and the state after the last segment.

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
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_v = tl.trans(load_tile(v, start, T, v_stride_t, o_v, V, C))  # [BV, C]
        b_y = load_pairs(inverse, start, T, C)
        b_beta = load_weight(weights, BETA, start, T, C)[None, :]
        b_factor = b_state.to(b_k.dtype)
        b_r = tl.dot(b_factor, tl.trans(b_k), input_precision=PRECISION)  # [BV, C]
        if DECAY:
            b_from_start = load_weight(weights, FROM_START, start, T, C)[None, :]
            b_r *= b_from_start
        b_r = b_v.to(tl.float32) - b_r
        b_r = tl.dot((b_r * b_beta).to(b_k.dtype), tl.trans(b_y), b_r, input_precision=PRECISION)
        b_kept = b_r * tl.where(b_beta == 0, 1.0, b_beta)
        b_written = tl.where(b_beta == 0, 0.0, b_kept)
        if not SUMMARIZE:
            b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
            b_scores = load_pairs(scores, start, T, C)
            b_out = tl.dot(b_factor, tl.trans(b_q), input_precision=PRECISION) * scale
            if DECAY:
                b_out *= b_from_start
            b_out = tl.dot(
                b_written.to(b_k.dtype), tl.trans(b_scores), b_out, input_precision=PRECISION
            )
            o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
            mask = (o_c < T - start)[None, :] & (o_v < V)[:, None]
            tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=mask)
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


@triton.jit
def value_gradient_kernel(
    q, k, do, weights, through, inverse, scores, written, leaving_gradient, entering_gradient,
    dv, beta_sums,
    T, H, group, segment, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, SUMMARIZE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient over a segment's chunks, from the last. SUMMARIZE: from zero; writes
    what the segment begins with. Otherwise from that of the leaving state; writes dv, the block's
    part of dβ, and the gradient of the first segment's entering state.

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
        beta_sums += (block * tl.num_programs(2) + row).to(tl.int64) * T
        p_state = leaving_gradient + stretch * K * V + o_state
        b_gradient = tl.load(p_state, mask=mask_state, other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i) * C
        b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
        b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
        b_do = tl.trans(load_tile(do, start, T, do_stride_t, o_v, V, C))  # [BV, C]
        b_y = load_pairs(inverse, start, T, C)
        b_scores = load_pairs(scores, start, T, C)
        b_beta = load_weight(weights, BETA, start, T, C)[None, :]
        b_e = tl.dot(b_gradient.to(b_k.dtype), tl.trans(b_k), input_precision=PRECISION)
        b_seen = b_do * scale
        if DECAY:
            b_e *= load_weight(weights, TO_END, start, T, C)[None, :]
            b_from_start = load_weight(weights, FROM_START, start, T, C)[None, :]
            b_seen *= b_from_start
            b_gradient *= tl.load(through + start // C)
        b_gradient = tl.dot(b_seen.to(b_k.dtype), b_q, b_gradient, input_precision=PRECISION)
        b_e = tl.dot(b_do, b_scores, b_e, input_precision=PRECISION)
        b_e = tl.dot((b_e * b_beta).to(b_k.dtype), b_y, b_e, input_precision=PRECISION)
        if not SUMMARIZE:
            mask_c = o_c < T - start
            o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
            mask = mask_c[None, :] & (o_v < V)[:, None]
            b_kept = tl.trans(load_tile(written, start, T, H * V, o_v, V, C))
            tl.store(dv + o_out, (b_e * b_beta).to(dv.dtype.element_ty), mask=mask)
            b_dbeta = tl.sum(b_e * b_kept / tl.where(b_beta == 0, 1.0, b_beta), axis=0)
            tl.store(beta_sums + start + o_c, b_dbeta, mask=mask_c)
        b_e *= -b_beta
        if DECAY:
            b_e *= b_from_start
        b_gradient = tl.dot(b_e.to(b_k.dtype), b_k, b_gradient, input_precision=PRECISION)

    if SUMMARIZE:
        tl.store(entering_gradient + stretch * K * V + o_state, b_gradient, mask=mask_state)
    else:
        if segment_index == 0:
            p_state = entering_gradient + row.to(tl.int64) * K * V + o_state
            tl.store(p_state, b_gradient, mask=mask_state)


@triton.jit
def pair_gradient_kernel(
    q, k, do, dv, written, weights, doc_ids, query_pairs, key_pairs, pair_sums,
    T, H, group, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and X + Xᵀ; with SUMS also what a chunk's pairs give a token's decay as the later of the
    two, less what they give it as the earlier. One matrix gives both, so that they cancel where
    they must.

    Grid: (N, 1, B·H). Reads do, dv, d (and q, k) once, writes 2 C numbers a token: bound by memory.
    """
    row, start = tl.program_id(2), tl.program_id(0) * C
    batch, head = row // H, row % H
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    dv += (batch.to(tl.int64) * T * H + head) * V
    written += (batch.to(tl.int64) * T * H + head) * V
    weights += row.to(tl.int64) * T
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start

    b_query, b_key = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    for first_v in tl.range(0, V, BV, num_stages=1):
        o_v = first_v + tl.arange(0, BV)
        b_written = tl.trans(load_tile(written, start, T, H * V, o_v, V, C))
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_query = tl.dot(b_do, b_written, b_query, input_precision=PRECISION)
        b_key = tl.dot(b_dv, b_written, b_key, input_precision=PRECISION)

    b_decay = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)
    if DECAY:
        o_token = tl.minimum(start + o_c, T - 1)  # G goes on as it is beyond T: no exponent rises
        b_sum = tl.load(weights + LOG_DECAY * (tl.num_programs(2).to(tl.int64) * T) + o_token)
        b_document = o_c
        if PACKED:
            doc_ids += batch.to(tl.int64) * T
            b_document = tl.load(doc_ids + o_token)
        b_decay = pair_decay(b_sum, b_document, C, PACKED, False)
    b_decay *= writes(weights, start, T, C)[None, :]
    b_query *= b_decay * scale
    b_key = tl.where(o_c[:, None] > o_c[None, :], b_key * -b_decay, 0.0)

    if SUMS:
        q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
        k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
        b_scores, b_keys = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
        for first_k in tl.range(0, K, BK, num_stages=1):
            o_k = first_k + tl.arange(0, BK)
            b_q = load_tile(q, start, T, q_stride_t, o_k, K, C)
            b_k = load_tile(k, start, T, k_stride_t, o_k, K, C)
            b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision=PRECISION)
            b_keys = tl.dot(b_k, tl.trans(b_k), b_keys, input_precision=PRECISION)
        b_amount = b_query * b_scores + b_key * b_keys
        b_amount = tl.sum(tl.trans(b_amount), axis=0) - tl.sum(b_amount, axis=0)
        tl.store(pair_sums + row.to(tl.int64) * T + start + o_c, b_amount, mask=mask_c)

    o_pairs = (row.to(tl.int64) * T + start) * C + o_c[:, None] * C + o_c[None, :]
    tl.store(query_pairs + o_pairs, b_query.to(query_pairs.dtype.element_ty), mask=mask_c[:, None])
    b_key += tl.trans(b_key)
    tl.store(key_pairs + o_pairs, b_key.to(key_pairs.dtype.element_ty), mask=mask_c[:, None])


@triton.jit
def query_gradient_kernel(
    q, k, do, dv, written, weights, through, query_pairs, entering, dq, dk, state_sums,
    T, H, group, segment, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and of dk what comes from a token's look at the entering state; with SUMS also what both
    give the decay since the chunk's start.

    Grid: (blocks of K, S, B·H). One program owns [BK, BV >= V] of a segment's running state. Reads
    do, dv, d and P once a block, k (and q) once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), block * BK + tl.arange(0, BK), tl.arange(0, BV)
    k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    weights += row.to(tl.int64) * T
    through += row * tl.cdiv(T, C)
    query_pairs += row.to(tl.int64) * T * C
    dv += (batch.to(tl.int64) * T * H + head) * V
    written += (batch.to(tl.int64) * T * H + head) * V
    dq += (batch.to(tl.int64) * T * H + head) * K
    dk += (batch.to(tl.int64) * T * H + head) * K
    if SUMS:
        q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
        state_sums += (block * tl.num_programs(2) + row).to(tl.int64) * T
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    p_state = entering + stretch * K * V + o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(p_state, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + i * C
        mask_c = o_c < T - start
        b_k = tl.trans(load_tile(k, start, T, k_stride_t, o_k, K, C))  # [BK, C]
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_written = load_tile(written, start, T, H * V, o_v, V, C)
        b_pair = load_pairs(query_pairs, start, T, C)
        b_factor = b_state.to(b_k.dtype)
        o_out = start.to(tl.int64) * (H * K) + (o_c[None, :] * (H * K) + o_k[:, None])
        mask = mask_c[None, :] & (o_k < K)[:, None]
        b_dk = -tl.dot(b_factor, tl.trans(b_dv), input_precision=PRECISION)  # [BK, C]
        b_weight = writes(weights, start, T, C)
        if DECAY:
            b_from_start = load_weight(weights, FROM_START, start, T, C)[None, :]
            b_dk *= b_from_start
            b_weight *= load_weight(weights, TO_END, start, T, C)
            b_state *= tl.load(through + start // C)
        if SUMS:
            b_given = tl.sum(b_k * b_dk, axis=0)
        tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=mask)
        b_dq = tl.dot(b_factor, tl.trans(b_do), input_precision=PRECISION) * scale
        if DECAY:
            b_dq *= b_from_start
        if SUMS:
            b_q = tl.trans(load_tile(q, start, T, q_stride_t, o_k, K, C))
            b_given += tl.sum(b_q * b_dq, axis=0)
            tl.store(state_sums + start + o_c, b_given, mask=mask_c)
        b_dq = tl.dot(b_k, tl.trans(b_pair), b_dq, input_precision=PRECISION)
        tl.store(dq + o_out, b_dq.to(dq.dtype.element_ty), mask=mask)
        b_key = (b_k * b_weight[None, :]).to(b_k.dtype)
        b_state = tl.dot(b_key, b_written, b_state, input_precision=PRECISION)


@triton.jit
def key_gradient_kernel(
    q, k, do, dv, written, weights, through, query_pairs, key_pairs, entering, final,
    leaving_gradient, state_sums, dk, after_sums, across_sums,
    T, H, group, segment, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, SUMS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk what comes from the pairs of a chunk and through the state after it. With SUMS
    also what the latter gives the decay until the chunk's end, and `across_sums` [blocks, B, H, N]
    what <state, its gradient> gives the decay over the whole chunk: its value at the chunk's end
    less what the chunk's own tokens have in it, and nothing where the chunk lets next to nothing
    through.

    Grid: (blocks of K, S, B·H). One program owns [BK, BV >= V] of the state's gradient. Reads do,
    dv, d and the pairs once a block, q, k and dk once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = segment_index * segment
    chunks = tl.cdiv(tl.minimum(first + segment, T) - first, C)
    o_c, o_k, o_v = tl.arange(0, C), block * BK + tl.arange(0, BK), tl.arange(0, BV)
    q += batch.to(tl.int64) * q_stride_b + (head // group).to(tl.int64) * q_stride_h
    k += batch.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    do += batch.to(tl.int64) * do_stride_b + head.to(tl.int64) * do_stride_h
    weights += row.to(tl.int64) * T
    through += row * tl.cdiv(T, C)
    query_pairs += row.to(tl.int64) * T * C
    key_pairs += row.to(tl.int64) * T * C
    dv += (batch.to(tl.int64) * T * H + head) * V
    written += (batch.to(tl.int64) * T * H + head) * V
    dk += (batch.to(tl.int64) * T * H + head) * K
    stretch = (batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head
    o_state = o_k[:, None] * V + o_v[None, :]
    mask_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_gradient = tl.load(leaving_gradient + stretch * K * V + o_state, mask=mask_state, other=0.0)
    if SUMS:
        sums_row = block * tl.num_programs(2) + row
        state_sums += sums_row.to(tl.int64) * T
        after_sums += sums_row.to(tl.int64) * T
        across_sums += sums_row * tl.cdiv(T, C)
        leaving = entering + (stretch + H) * K * V
        if segment_index == tl.num_programs(1) - 1:
            leaving = final + row.to(tl.int64) * K * V
        b_state = tl.load(leaving + o_state, mask=mask_state, other=0.0)
        carry = tl.sum(tl.sum(b_state * b_gradient, axis=1), axis=0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i) * C
        mask_c = o_c < T - start
        b_q = tl.trans(load_tile(q, start, T, q_stride_t, o_k, K, C))  # [BK, C]
        b_k = tl.trans(load_tile(k, start, T, k_stride_t, o_k, K, C))
        b_do = load_tile(do, start, T, do_stride_t, o_v, V, C)
        b_dv = load_tile(dv, start, T, H * V, o_v, V, C)
        b_written = load_tile(written, start, T, H * V, o_v, V, C)
        b_query, b_key = load_pairs(query_pairs, start, T, C), load_pairs(key_pairs, start, T, C)
        b_weight = writes(weights, start, T, C)
        b_seen, b_held = b_q * scale, -b_k.to(tl.float32)
        b_dk = tl.dot(b_gradient.to(b_k.dtype), tl.trans(b_written), input_precision=PRECISION)
        if DECAY:
            b_weight *= load_weight(weights, TO_END, start, T, C)
            b_from_start = load_weight(weights, FROM_START, start, T, C)[None, :]
            b_seen *= b_from_start
            b_held *= b_from_start
            b_through = tl.load(through + start // C)
            b_gradient *= b_through
        b_dk *= b_weight[None, :]
        if SUMS:
            b_after = tl.sum(b_k.to(tl.float32) * b_dk, axis=0)
            tl.store(after_sums + start + o_c, b_after, mask=mask_c)
            across = tl.where(b_through > negligible(EXACT), carry - tl.sum(b_after, axis=0), 0.0)
            tl.store(across_sums + start // C, across)
            b_before = tl.load(state_sums + start + o_c, mask=mask_c, other=0.0)
            carry = across + tl.sum(b_before, axis=0)
        b_gradient = tl.dot(b_seen.to(b_k.dtype), b_do, b_gradient, input_precision=PRECISION)
        b_gradient = tl.dot(b_held.to(b_k.dtype), b_dv, b_gradient, input_precision=PRECISION)
        b_dk = tl.dot(b_q, b_query, b_dk, input_precision=PRECISION)
        b_dk = tl.dot(b_k, b_key, b_dk, input_precision=PRECISION)
        p_dk = dk + start.to(tl.int64) * (H * K) + (o_c[None, :] * (H * K) + o_k[:, None])
        mask = mask_c[None, :] & (o_k < K)[:, None]
        b_dk += tl.load(p_dk, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dk, b_dk.to(dk.dtype.element_ty), mask=mask)


@triton.jit
def decay_gradient_kernel(
    pair_sums, state_sums, after_sums, across_sums, doc_ids, dg,
    T, H, blocks,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dg_t: what all pairs of tokens s < t <= t' give the decay between them. Of pairs inside the
    chunk, the running sum, from the end, of `pair_sums`; with s before the chunk, that of
    `state_sums`; with t' after it, the running sum, from the start, of `after_sums`; across the
    whole chunk, `across_sums`.

    Grid: (N, 1, B·H). Reads the sums of all blocks of K: small.
    """
    chunk, row = tl.program_id(0), tl.program_id(2)
    batch, head, start = row // H, row % H, chunk * C
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    o_sums = row.to(tl.int64) * T + start + o_c
    b_before = tl.load(pair_sums + o_sums, mask=mask_c, other=0.0)
    b_after, across = tl.zeros([C], dtype=tl.float32), 0.0
    for block in range(blocks):
        o_block = (block * tl.num_programs(2)).to(tl.int64) * T + o_sums
        b_before += tl.load(state_sums + o_block, mask=mask_c, other=0.0)
        b_after += tl.load(after_sums + o_block, mask=mask_c, other=0.0)
        o_across = (block * tl.num_programs(2) + row) * tl.num_programs(0) + chunk
        across += tl.load(across_sums + o_across)
    b_amount = tl.where(o_c[:, None] <= o_c[None, :], b_before[None, :], b_after[None, :])
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
        b_document = tl.load(doc_ids + tl.minimum(start + o_c, T - 1))
        b_amount = tl.where(b_document[:, None] == b_document[None, :], b_amount, 0.0)
    p_dg = dg + (batch.to(tl.int64) * T + start + o_c) * H + head
    tl.store(p_dg, tl.sum(b_amount, axis=1) + across, mask=mask_c)
