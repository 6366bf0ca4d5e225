"""Kernels of RWKV7's recurrence, forward and backward.

With G the running sum of g inside a chunk of C tokens, S the state that enters it and S' the one
that leaves it, the rows u_t = S_{t-1}ᵀ a_t of a chunk solve a unit lower triangular system (the WY
form, arXiv:2406.06484):

    (1 - A_ab) U = ā S + A_ak V,    A_xy[t, s] = Σ_K x_t e^{G_t - G_s} y_s,
    O = r̄ S + A_rk V + A_rb U,      S' = e^{G_C} S + k̄ᵀ V + b̄ᵀ U,

where a looks at the state before its own token: with G_{t-1} in place of G_t, and s < t. r̄, ā hold
the decay since the chunk's start, k̄, b̄ that until its end; r̄, A_rk and A_rb the scale. With
1 + Y = (1 - A_ab)⁻¹, W = (1 + Y) ā and P = (1 + Y) A_ak, a chunk is walked forward and back alike:

    U  = W S + P V            O  = r̄ S  + A_rk V  + A_rb U      S' = e^{G_C} S + k̄ᵀ V + b̄ᵀ U
    dU = b̄ dS' + A_rbᵀ dO     dV = k̄ dS' + A_rkᵀ dO + Pᵀ dU     dS = e^{G_C} dS' + r̄ᵀ dO + Wᵀ dU

so that (W, r̄; P, A_rk, A_rb) and (b̄, k̄; A_rbᵀ, A_rkᵀ, Pᵀ) take the same kernel. Given U and dU,

    dr̄ = dO Sᵀ    dW = dU Sᵀ    dk̄ = V dS'ᵀ    db̄ = U dS'ᵀ    dā = (1 + Yᵀ) dW
    dA_rk = dO Vᵀ    dA_rb = dO Uᵀ    dA_ak = E Vᵀ    dA_ab = E Uᵀ    E = (1 + Yᵀ) dU

`prepare_kernel` computes W, r̄, b̄, k̄ and the pairs of a chunk, so that what walks the chunks
(`value_walk_kernel`, `key_walk_kernel`) sees neither gates nor documents; `pair_gradient_kernel`
undoes it.

The decay differs by channel and cannot be split off a product. As in
fla_dist.kernels.gla.triton_kernels, pairs are sorted by the level at which the blocks that hold s
and t are neighbours, and both are measured from the border between the two, so that no exponent is
positive and each level is a product on tensor cores. Later tokens enter with r e^{g_t} and a, and
the decay between the border and t, t left out; earlier ones with k and b. The inverse is merged
from the same levels: blocks of b tokens to blocks of 2b.

Notation: B batch, T tokens, H heads, K and V head sizes, C tokens a chunk, N chunks, S segments.
Inputs, o, U and gradients are contiguous, [B, T, H, ·]; `reads` (W, r̄) and `writes` (b̄, k̄) [2, B,
H, T, K]; `pairs` (P, A_rk, A_rb, Y) [4, B, H, T, C]; states [B, S, H, K, V] and transitions [B, S,
H, K, K] fp32; `through`, the decay over a chunk, [B, H, N, K] fp32. The walks keep the state of
every stretch of chunks [B, stretches, H, K, V], from which the key walks start. `b_*` blocks in
registers, `p_*` pointers, `o_*` offsets. A document reaches across chunks as
kernels/common/documents.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.levels import (
    chunk_documents,
    is_later,
    level_pairs,
    load_spans,
    summands,
)
from fla_dist.kernels.common.segments import LOG2_E, negligible
from fla_dist.kernels.gated_delta_rule.triton_kernels import load_tile

SOLVED_VALUES: tl.constexpr = tl.constexpr(0)
VALUE_SCORES: tl.constexpr = tl.constexpr(1)
SOLVED_SCORES: tl.constexpr = tl.constexpr(2)
INVERSE: tl.constexpr = tl.constexpr(3)


@triton.jit
def load_pairs(pairs, KIND: tl.constexpr, rows, start, T, C: tl.constexpr):
    """[C, C] of the chunk at `start`; `pairs` points to the first token of one of `rows`
    sequences."""
    o_c = tl.arange(0, C)
    p_pair = pairs + (KIND * rows.to(tl.int64) * T + start) * C
    p_pair += o_c[:, None] * C + o_c[None, :]
    return tl.load(p_pair, mask=(o_c < T - start)[:, None], other=0.0)


@Kernel
@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    r, k, a, b, g, doc_ids, spans, reads, writes, pairs, through,
    T, H, scale,
    C: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """`reads` and `writes`, zero where a document keeps the token from the chunk's start or its
    end; `pairs`, zero between documents; `through`, zero where a document starts.

    Grid: (N, B·H). Reads r, k, b once, a and g twice; writes 4 K + 4 C numbers a token.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    batch, head, start = row // H, row % H, chunk * C
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    plane = tl.num_programs(1).to(tl.int64) * T
    o_in = ((batch.to(tl.int64) * T + start) * H + head) * K
    o_out = (row.to(tl.int64) * T + start) * K
    through += (row.to(tl.int64) * tl.num_programs(0) + chunk) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, passes = chunk_documents(doc_ids, start, T, C, PACKED)
    o_pair = o_c[:, None] * C + o_c[None, :]
    same = o_c[:, None] == o_c[None, :]

    b_spans = load_spans(spans, o_pair, LEVELS + 3, C)
    b_rk, b_rb = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    b_ak, b_ab = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask = mask_c[:, None] & (o_k < K)[None, :]
        o_tile = o_in + (o_c[:, None] * (H * K) + o_k[None, :])
        o_row = o_out + (o_c[:, None] * K + o_k[None, :])
        b_r = tl.load(r + o_tile, mask=mask, other=0.0)
        b_k = tl.load(k + o_tile, mask=mask, other=0.0)
        b_a = tl.load(a + o_tile, mask=mask, other=0.0)
        b_b = tl.load(b + o_tile, mask=mask, other=0.0)
        b_g = tl.load(g + o_tile, mask=mask, other=0.0)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_product = tl.dot(b_r, tl.trans(b_k), b_rk, input_precision=PRECISION)
        b_rk = tl.where(same, b_product, b_rk)
        b_product = tl.dot(b_r, tl.trans(b_b), b_rb, input_precision=PRECISION)
        b_rb = tl.where(same, b_product, b_rb)

        b_own = b_r * tl.exp2(tl.dot(b_spans[LEVELS + 2], b_summands, input_precision="ieee"))
        b_in = b_own * tl.exp2(tl.dot(b_spans[LEVELS], b_summands, input_precision="ieee")) * scale
        b_after = tl.exp2(tl.dot(b_spans[LEVELS + 1], b_summands, input_precision="ieee"))
        b_through = tl.exp2(tl.sum(b_g.to(tl.float32), axis=0) * LOG2_E)
        if PACKED:
            b_in = tl.where(b_continues[:, None], b_in, 0.0)
            b_after = tl.where(b_last[:, None], b_after, 0.0)
            b_through = tl.where(passes, b_through, 0.0)
        tl.store(reads + plane * K + o_row, b_in.to(reads.dtype.element_ty), mask=mask)
        tl.store(writes + o_row, (b_b * b_after).to(writes.dtype.element_ty), mask=mask)
        tl.store(writes + plane * K + o_row, (b_k * b_after).to(writes.dtype.element_ty), mask=mask)
        tl.store(through + o_k, b_through, mask=o_k < K)

        for level in tl.static_range(LEVELS):
            later, between = is_later(o_c, level)[:, None], level_pairs(o_c, level)
            b_first, b_second = tl.where(later, b_own, b_k), tl.where(later, b_a, b_b)
            if level > 0:
                b_decay = tl.exp2(tl.dot(b_spans[level], b_summands, input_precision="ieee"))
                b_first, b_second = b_first * b_decay, b_second * b_decay
            b_first, b_second = b_first.to(b_k.dtype), b_second.to(b_k.dtype)
            b_product = tl.dot(b_first, tl.trans(b_first), b_rk, input_precision=PRECISION)
            b_rk = tl.where(between, b_product, b_rk)
            b_product = tl.dot(b_first, tl.trans(b_second), b_rb, input_precision=PRECISION)
            b_rb = tl.where(between, b_product, b_rb)
            b_product = tl.dot(b_second, tl.trans(b_first), b_ak, input_precision=PRECISION)
            b_ak = tl.where(between, b_product, b_ak)
            b_product = tl.dot(b_second, tl.trans(b_second), b_ab, input_precision=PRECISION)
            b_ab = tl.where(between, b_product, b_ab)

    visible, earlier = o_c[:, None] >= o_c[None, :], o_c[:, None] > o_c[None, :]
    if PACKED:
        together = b_document[:, None] == b_document[None, :]
        visible, earlier = visible & together, earlier & together
    b_rk = tl.where(visible, b_rk * scale, 0.0)
    b_rb = tl.where(visible, b_rb * scale, 0.0)
    b_ak, b_ab = tl.where(earlier, b_ak, 0.0), tl.where(earlier, b_ab, 0.0)

    # Between the two blocks of a level: (1 + Y_2) A (1 + Y_1).
    b_y = tl.where(level_pairs(o_c, 0), b_ab, 0.0)
    for level in tl.static_range(1, LEVELS):
        b_between = tl.where(level_pairs(o_c, level), b_ab, 0.0)
        b_between = tl.dot(b_between, b_y, b_between, input_precision=SOLVE)
        b_y += tl.dot(b_y, b_between, b_between, input_precision=SOLVE)
    dtype = pairs.dtype.element_ty
    b_inverse = b_y.to(dtype)
    b_ak = tl.dot(b_inverse, b_ak.to(dtype), b_ak, input_precision=PRECISION)
    pairs += (row.to(tl.int64) * T + start) * C + o_pair
    tl.store(pairs + SOLVED_VALUES * plane * C, b_ak.to(dtype), mask=mask_c[:, None])
    tl.store(pairs + VALUE_SCORES * plane * C, b_rk.to(dtype), mask=mask_c[:, None])
    tl.store(pairs + SOLVED_SCORES * plane * C, b_rb.to(dtype), mask=mask_c[:, None])
    tl.store(pairs + INVERSE * plane * C, b_inverse, mask=mask_c[:, None])

    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask = mask_c[:, None] & (o_k < K)[None, :]
        o_tile = o_in + (o_c[:, None] * (H * K) + o_k[None, :])
        b_a = tl.load(a + o_tile, mask=mask, other=0.0)
        b_g = tl.load(g + o_tile, mask=mask, other=0.0)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_in = b_a * tl.exp2(tl.dot(b_spans[LEVELS], b_summands, input_precision="ieee"))
        if PACKED:
            b_in = tl.where(b_continues[:, None], b_in, 0.0)
        b_in = tl.dot(b_inverse, b_in.to(dtype), b_in, input_precision=PRECISION)
        o_row = o_out + (o_c[:, None] * K + o_k[None, :])
        tl.store(reads + o_row, b_in.to(reads.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["T"])
def value_walk_kernel(
    reads, writes, z, pairs, through, entering, out, solved, states, leaving, transition,
    T, H, segment, stretch,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, SUMMARIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence over a segment's chunks, forward with z = V, or from the last chunk with
    `reads` and `writes` exchanged and z = dO. SUMMARIZE: from zero, and forward also on the columns
    of the identity without values; writes the state and the transition that the segment ends in.
    Otherwise from the entering state; writes O and U (dV and dU), the state that enters each
    stretch, and the one that leaves the last segment (the first).

    Grid: (blocks of V, and of K for the transition, S, B·H). One program owns [BV, BK >= K] of the
    transposed state: it is the first factor of every product it is in, which comes from registers.
    Reads `reads`, `writes` and the pairs once a block, z once.
    """
    block, segment_index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    rows = tl.num_programs(2)
    plane = rows.to(tl.int64) * T * K
    first = segment_index * segment
    last = tl.minimum(first + segment, T)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    reads += row.to(tl.int64) * T * K
    writes += row.to(tl.int64) * T * K
    pairs += row.to(tl.int64) * T * C
    through += row.to(tl.int64) * tl.cdiv(T, C) * K
    z += (batch.to(tl.int64) * T * H + head) * V
    o_state = o_k[None, :] * V + o_v[:, None]
    mask_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    o_entering = ((batch.to(tl.int64) * tl.num_programs(1) + segment_index) * H + head) * K
    o_column = o_v - tl.cdiv(V, BV) * BV  # of the identity; negative in a block of values
    if SUMMARIZE:
        b_state = tl.where(o_column[:, None] == o_k[None, :], 1.0, 0.0)
    else:
        out += (batch.to(tl.int64) * T * H + head) * V
        solved += (batch.to(tl.int64) * T * H + head) * V
        b_state = tl.load(entering + o_entering * V + o_state, mask=mask_state, other=0.0)

    stretches = tl.cdiv(last - first, stretch)
    for i in range(stretches):
        begin = first + (stretches - 1 - i if REVERSE else i) * stretch
        if not SUMMARIZE:
            o_kept = ((batch.to(tl.int64) * tl.cdiv(T, stretch) + begin // stretch) * H + head) * K
            tl.store(states + o_kept * V + o_state, b_state, mask=mask_state)
        chunks = tl.cdiv(tl.minimum(begin + stretch, last) - begin, C)
        for j in tl.range(0, chunks, num_stages=STAGES):
            start = begin + (chunks - 1 - j if REVERSE else j) * C
            b_read = load_tile(reads, start, T, K, o_k, K, C)
            b_write = load_tile(writes, start, T, K, o_k, K, C)
            b_second_write = load_tile(writes + plane, start, T, K, o_k, K, C)
            b_z = tl.trans(load_tile(z, start, T, H * V, o_v, V, C))  # [BV, C]
            if REVERSE:
                b_pair = load_pairs(pairs, SOLVED_SCORES, rows, start, T, C)
            else:
                b_pair = tl.trans(load_pairs(pairs, SOLVED_VALUES, rows, start, T, C))
            o_through = (start // C).to(tl.int64) * K + o_k
            b_through = tl.load(through + o_through, mask=o_k < K, other=0.0)
            b_factor = b_state.to(b_z.dtype)
            b_solved = tl.dot(b_z, b_pair, input_precision=PRECISION)
            b_solved = tl.dot(b_factor, tl.trans(b_read), b_solved, input_precision=PRECISION)
            b_u = b_solved.to(b_z.dtype)
            if not SUMMARIZE:
                b_second_read = load_tile(reads + plane, start, T, K, o_k, K, C)
                b_score = load_pairs(pairs, VALUE_SCORES, rows, start, T, C)
                if REVERSE:
                    b_pair = load_pairs(pairs, SOLVED_VALUES, rows, start, T, C)
                else:
                    b_score = tl.trans(b_score)
                    b_pair = tl.trans(load_pairs(pairs, SOLVED_SCORES, rows, start, T, C))
                b_out = tl.dot(b_factor, tl.trans(b_second_read), input_precision=PRECISION)
                b_out = tl.dot(b_z, b_score, b_out, input_precision=PRECISION)
                b_out = tl.dot(b_u, b_pair, b_out, input_precision=PRECISION)
                o_out = start.to(tl.int64) * (H * V) + (o_c[None, :] * (H * V) + o_v[:, None])
                mask = (o_c < T - start)[None, :] & (o_v < V)[:, None]
                tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=mask)
                tl.store(solved + o_out, b_u, mask=mask)
            b_state *= b_through[None, :]
            b_state = tl.dot(b_u, b_write, b_state, input_precision=PRECISION)
            b_state = tl.dot(b_z, b_second_write, b_state, input_precision=PRECISION)

    if SUMMARIZE:
        tl.store(leaving + o_entering * V + o_state, b_state, mask=mask_state)
        if not REVERSE:
            p_transition = transition + o_entering * K + o_k[None, :] * K + o_column[:, None]
            mask = (o_k < K)[None, :] & ((o_column >= 0) & (o_column < K))[:, None]
            tl.store(p_transition, b_state, mask=mask)
    else:
        if segment_index == (0 if REVERSE else tl.num_programs(1) - 1):
            tl.store(leaving + row.to(tl.int64) * K * V + o_state, b_state, mask=mask_state)


@Kernel
@triton.jit(do_not_specialize=["T"])
def key_walk_kernel(
    u, v, added_u, added_v, own, other, through, states, first_out, second_out, sums,
    entering, final, across,
    T, H, stretch,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the state gives: in reverse db̄ and dk̄, the products of dS' with (u, v) = (U, V), and
    own = (b̄, k̄); the state takes in `added_*` = (dU, dO) by other = (W, r̄). Forward dW and dr̄, of
    S, with all pairs exchanged.

    For dg, the forward walk writes to `sums` what W ⊙ dW and r̄ ⊙ dr̄ of each chunk add up to, [B, H,
    N, K]. The reverse walk takes them, and writes to `across` what pairs with one token before a
    chunk and one after it give the decays in it: <state, its gradient> at the chunk's end, less
    what the chunk's own tokens have in it, and nothing where the chunk lets next to nothing
    through. `entering` is the forward walk's `states`, `final` the state after the last.

    Grid: (blocks of K, stretches, B·H). One program owns [BK, BV >= V] of a stretch's running
    state. Reads values once a block, `own` and `other` once.
    """
    block, index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // H, row % H
    first = index * stretch
    chunks = tl.cdiv(tl.minimum(first + stretch, T) - first, C)
    plane = tl.num_programs(2).to(tl.int64) * T * K
    o_c, o_k, o_v = tl.arange(0, C), block * BK + tl.arange(0, BK), tl.arange(0, BV)
    o_values = (batch.to(tl.int64) * T * H + head) * V
    u += o_values
    v += o_values
    added_u += o_values
    added_v += o_values
    first_out += (batch.to(tl.int64) * T * H + head) * K
    second_out += (batch.to(tl.int64) * T * H + head) * K
    own += row.to(tl.int64) * T * K
    other += row.to(tl.int64) * T * K
    o_chunks = row.to(tl.int64) * tl.cdiv(T, C) * K
    through += o_chunks
    sums += o_chunks
    across += o_chunks
    o_state = o_k[:, None] * V + o_v[None, :]
    mask_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    kept = ((batch.to(tl.int64) * tl.num_programs(1) + index) * H + head) * K * V
    b_state = tl.load(states + kept + o_state, mask=mask_state, other=0.0)
    b_carry = tl.zeros([BK], dtype=tl.float32)
    if REVERSE:
        leaving = entering + kept + H * K * V
        if index == tl.num_programs(1) - 1:
            leaving = final + row.to(tl.int64) * K * V
        b_carry = tl.sum(b_state * tl.load(leaving + o_state, mask=mask_state, other=0.0), axis=1)

    for i in tl.range(0, chunks, num_stages=STAGES):
        start = first + (chunks - 1 - i if REVERSE else i) * C
        b_u = tl.trans(load_tile(u, start, T, H * V, o_v, V, C))  # [BV, C]
        b_v = tl.trans(load_tile(v, start, T, H * V, o_v, V, C))
        b_added_u = load_tile(added_u, start, T, H * V, o_v, V, C)
        b_added_v = load_tile(added_v, start, T, H * V, o_v, V, C)
        b_other_u = tl.trans(load_tile(other, start, T, K, o_k, K, C))  # [BK, C]
        b_other_v = tl.trans(load_tile(other + plane, start, T, K, o_k, K, C))
        b_own_u = tl.trans(load_tile(own, start, T, K, o_k, K, C))
        b_own_v = tl.trans(load_tile(own + plane, start, T, K, o_k, K, C))
        o_chunk = (start // C).to(tl.int64) * K + o_k
        b_through = tl.load(through + o_chunk, mask=o_k < K, other=0.0)
        b_factor = b_state.to(b_u.dtype)
        b_first = tl.dot(b_factor, b_u, input_precision=PRECISION)
        b_second = tl.dot(b_factor, b_v, input_precision=PRECISION)
        b_change = tl.dot(b_own_u, tl.trans(b_u), input_precision=PRECISION)
        b_change = tl.dot(b_own_v, tl.trans(b_v), b_change, input_precision=PRECISION)
        b_sums = tl.sum(b_state * b_change, axis=1)  # of states that are not rounded: it cancels
        o_out = start.to(tl.int64) * (H * K) + (o_c[None, :] * (H * K) + o_k[:, None])
        mask = (o_c < T - start)[None, :] & (o_k < K)[:, None]
        tl.store(first_out + o_out, b_first.to(first_out.dtype.element_ty), mask=mask)
        tl.store(second_out + o_out, b_second.to(second_out.dtype.element_ty), mask=mask)
        if REVERSE:
            b_across = tl.where(b_through > negligible(PRECISION == "ieee"), b_carry - b_sums, 0.0)
            tl.store(across + o_chunk, b_across, mask=o_k < K)
            b_carry = b_across + tl.load(sums + o_chunk, mask=o_k < K, other=0.0)
        else:
            tl.store(sums + o_chunk, b_sums, mask=o_k < K)
        b_state *= b_through[:, None]
        b_state = tl.dot(b_other_u, b_added_u, b_state, input_precision=PRECISION)
        b_state = tl.dot(b_other_v, b_added_v, b_state, input_precision=PRECISION)


@Kernel
@triton.jit(do_not_specialize=["T"])
def pair_gradient_kernel(
    r, k, a, b, g, v, do, u, du, doc_ids, spans, gradient_spans, pairs, across,
    dr, dk, da, db, dg,
    T, H, scale,
    C: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dr, dk, da and db, which hold dr̄, dk̄, dW and db̄, from these and from the chunk's pairs; then
    dg.

    A token times its gradient is the gradient of the exponents in its decays: from the other chunks
    of the sums from the chunk's start and to its end, and from each level of its own spans.

    Grid: (N, B·H). Reads all inputs, U, dO and dU once; reads and writes dr, dk, da, db, writes dg.
    """
    row, start = tl.program_id(1), tl.program_id(0) * C
    batch, head = row // H, row % H
    o_c = tl.arange(0, C)
    mask_c = o_c < T - start
    o_values = ((batch.to(tl.int64) * T + start) * H + head) * V
    o_keys = ((batch.to(tl.int64) * T + start) * H + head) * K
    across += (row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K
    if PACKED:
        doc_ids += batch.to(tl.int64) * T
    b_document, b_continues, b_last, _ = chunk_documents(doc_ids, start, T, C, PACKED)
    pairs += row.to(tl.int64) * T * C
    b_inverse = load_pairs(pairs, INVERSE, tl.num_programs(1), start, T, C)

    # The gradient of each pair, in the row of its later token and, mirrored, of its earlier one.
    b_rk, b_kr = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    b_rb, b_br = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    b_ak, b_ka = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    b_ab, b_ba = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    for first_v in tl.range(0, V, BV, num_stages=1):
        o_v = first_v + tl.arange(0, BV)
        mask = mask_c[:, None] & (o_v < V)[None, :]
        o_tile = o_values + (o_c[:, None] * (H * V) + o_v[None, :])
        b_v = tl.load(v + o_tile, mask=mask, other=0.0)
        b_do = tl.load(do + o_tile, mask=mask, other=0.0)
        b_u = tl.load(u + o_tile, mask=mask, other=0.0)
        b_du = tl.load(du + o_tile, mask=mask, other=0.0)
        b_e = b_du.to(tl.float32)
        b_e = tl.dot(tl.trans(b_inverse), b_du, b_e, input_precision=PRECISION).to(b_v.dtype)
        b_rk = tl.dot(b_do, tl.trans(b_v), b_rk, input_precision=PRECISION)
        b_kr = tl.dot(b_v, tl.trans(b_do), b_kr, input_precision=PRECISION)
        b_rb = tl.dot(b_do, tl.trans(b_u), b_rb, input_precision=PRECISION)
        b_br = tl.dot(b_u, tl.trans(b_do), b_br, input_precision=PRECISION)
        b_ak = tl.dot(b_e, tl.trans(b_v), b_ak, input_precision=PRECISION)
        b_ka = tl.dot(b_v, tl.trans(b_e), b_ka, input_precision=PRECISION)
        b_ab = tl.dot(b_e, tl.trans(b_u), b_ab, input_precision=PRECISION)
        b_ba = tl.dot(b_u, tl.trans(b_e), b_ba, input_precision=PRECISION)
    after = o_c[:, None] > o_c[None, :]
    b_self_k = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_rk, 0.0), axis=0) * scale
    b_self_b = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_rb, 0.0), axis=0) * scale
    b_rk = tl.where(after, b_rk, b_kr) * scale
    b_ab = tl.where(after, b_ab, b_ba)
    b_rb, b_br = tl.where(after, b_rb * scale, b_ka), tl.where(after, b_ak, b_br * scale)
    if PACKED:
        together = b_document[:, None] == b_document[None, :]
        b_rk, b_ab = tl.where(together, b_rk, 0.0), tl.where(together, b_ab, 0.0)
        b_rb, b_br = tl.where(together, b_rb, 0.0), tl.where(together, b_br, 0.0)

    # Everything else is transposed, [K, C]: what one product returns enters the next as it is.
    o_pair = o_c[:, None] * C + o_c[None, :]
    o_transposed = o_c[None, :] * C + o_c[:, None]
    b_spans = load_spans(spans, o_transposed, LEVELS + 3, C)
    b_gradient_spans = load_spans(gradient_spans, o_pair, LEVELS + 2, C)
    for first_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = first_k + tl.arange(0, BK)
        mask = (o_k < K)[:, None] & mask_c[None, :]
        o_tile = o_keys + (o_k[:, None] + o_c[None, :] * (H * K))
        b_g = tl.load(g + o_tile, mask=mask, other=0.0)
        b_r = tl.load(r + o_tile, mask=mask, other=0.0)
        b_k = tl.load(k + o_tile, mask=mask, other=0.0)
        b_a = tl.load(a + o_tile, mask=mask, other=0.0)
        b_b = tl.load(b + o_tile, mask=mask, other=0.0)
        b_dr = tl.load(dr + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_dk = tl.load(dk + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_dw = tl.load(da + o_tile, mask=mask, other=0.0)
        b_db = tl.load(db + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_da = tl.dot(b_dw, b_inverse, b_dw.to(tl.float32), input_precision=PRECISION)
        if PACKED:
            b_dr = tl.where(b_continues[None, :], b_dr, 0.0)
            b_da = tl.where(b_continues[None, :], b_da, 0.0)
            b_dk = tl.where(b_last[None, :], b_dk, 0.0)
            b_db = tl.where(b_last[None, :], b_db, 0.0)
        b_summands = summands(b_g, PRECISION == "ieee")
        b_decay = tl.exp2(tl.dot(b_summands, b_spans[LEVELS + 2], input_precision="ieee"))
        b_own = b_r * b_decay

        b_before = tl.exp2(tl.dot(b_summands, b_spans[LEVELS], input_precision="ieee"))
        b_after = tl.exp2(tl.dot(b_summands, b_spans[LEVELS + 1], input_precision="ieee"))
        b_dr *= b_before * scale
        b_da *= b_before
        b_dk *= b_after
        b_db *= b_after
        b_change = (b_own * b_dr + b_a * b_da).to(gradient_spans.dtype.element_ty)
        b_dg = tl.dot(b_change, b_gradient_spans[LEVELS], input_precision=PRECISION)
        b_change = (b_k * b_dk + b_b * b_db).to(gradient_spans.dtype.element_ty)
        b_dg = tl.dot(b_change, b_gradient_spans[LEVELS + 1], b_dg, input_precision=PRECISION)

        for level in tl.static_range(LEVELS):
            later, between = is_later(o_c, level)[None, :], level_pairs(o_c, level)
            b_first, b_second = tl.where(later, b_own, b_k), tl.where(later, b_a, b_b)
            b_first, b_second = b_first.to(tl.float32), b_second.to(tl.float32)
            if level > 0:
                b_span = tl.exp2(tl.dot(b_summands, b_spans[level], input_precision="ieee"))
                b_first *= b_span
                b_second *= b_span
            dtype = v.dtype.element_ty
            b_x, b_y = b_first.to(dtype), b_second.to(dtype)
            b_level = tl.trans(tl.where(between, b_rk, 0.0).to(dtype))
            b_dx = tl.dot(b_x, b_level, input_precision=PRECISION)
            b_level = tl.trans(tl.where(between, b_rb, 0.0).to(dtype))
            b_dx = tl.dot(b_y, b_level, b_dx, input_precision=PRECISION)
            b_level = tl.trans(tl.where(between, b_ab, 0.0).to(dtype))
            b_dy = tl.dot(b_y, b_level, input_precision=PRECISION)
            b_level = tl.trans(tl.where(between, b_br, 0.0).to(dtype))
            b_dy = tl.dot(b_x, b_level, b_dy, input_precision=PRECISION)
            if level > 0:
                b_change = (b_first * b_dx + b_second * b_dy).to(gradient_spans.dtype.element_ty)
                b_dg = tl.dot(b_change, b_gradient_spans[level], b_dg, input_precision=PRECISION)
                b_dx *= b_span
                b_dy *= b_span
            b_dr += tl.where(later, b_dx, 0.0)
            b_da += tl.where(later, b_dy, 0.0)
            b_dk += tl.where(later, 0.0, b_dx)
            b_db += tl.where(later, 0.0, b_dy)
        b_dg += b_own * b_dr + tl.load(across + o_k, mask=o_k < K, other=0.0)[:, None]
        b_dr = b_dr * b_decay + b_self_k[None, :] * b_k + b_self_b[None, :] * b_b
        b_dk += b_self_k[None, :] * b_r
        b_db += b_self_b[None, :] * b_r
        tl.store(dg + o_tile, b_dg.to(dg.dtype.element_ty), mask=mask)
        tl.store(dr + o_tile, b_dr.to(dr.dtype.element_ty), mask=mask)
        tl.store(dk + o_tile, b_dk.to(dk.dtype.element_ty), mask=mask)
        tl.store(da + o_tile, b_da.to(da.dtype.element_ty), mask=mask)
        tl.store(db + o_tile, b_db.to(db.dtype.element_ty), mask=mask)
