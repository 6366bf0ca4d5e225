"""Gated slot attention: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked, rows_contiguous
from fla_dist.kernels.common.validation import check, check_attention, check_rank
from fla_dist.kernels.gsa.reference import gsa_chunked
from fla_dist.kernels.gsa.settings import CHECKED, SHORTEST, SLOTS
from fla_dist.kernels.gsa.steps import (
    decay_gradient,
    output,
    prepare,
    query_gradient,
    softmax_gradient,
    source_gradients,
    summarize,
)
from fla_dist.kernels.state import LOCAL, Diagonal, Scan


class SegmentedGSA(torch.autograd.Function):
    """Prepare the chunks, summarize the segments, join keys and values of the slots at once, walk
    them: q gathers of the keys, the softmax of that spreads the values. The backward mirrors it: do
    gathers of the values, the softmax' gradient spreads the keys. Saves what the softmax took and
    gave, the pairs', and the states that enter segments."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, initial_state, doc_ids, scale, scan):
        decay_in, taken_out, chunk_decay, products, inside = prepare(q, k, g, doc_ids, scale)
        state, log_decay = summarize(taken_out, taken_out, k, v, chunk_decay, False)
        pending = scan.start(Diagonal(log_decay), state, initial_state)
        entering, final = pending.wait()
        o, *softmax = output(
            q, k, v, g, doc_ids, decay_in, taken_out, chunk_decay, inside, entering, scale
        )
        ctx.save_for_backward(q, k, v, g, doc_ids, products, *softmax, entering, final)
        ctx.pending, ctx.scan, ctx.scale = pending, scan, scale
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        (
            q, k, v, g, doc_ids, key_products, weights, weights_in, inherited, scores, entering,
            final,
        ) = ctx.saved_tensors  # fmt: skip
        do = torch.zeros_like(v) if do is None else rows_contiguous(do)
        decay_in, taken_out, chunk_decay, value_products, inside = prepare(do, v, g, doc_ids, 1.0)
        gradients, gradients_in, exponents, sums = softmax_gradient(
            do, k, v, decay_in, taken_out, chunk_decay, inside, entering, weights, inherited,
            ctx.scale,
        )  # fmt: skip
        del decay_in, inside
        state_gradient, _ = summarize(gradients_in, weights_in, q, do, chunk_decay, True)
        pending = ctx.scan.start(
            ctx.pending.transition, state_gradient, final_gradient, reverse_of=ctx.pending
        )
        del state_gradient
        dq, key_scores, key_sums = query_gradient(
            q, k, v, g, doc_ids, taken_out, chunk_decay, gradients, gradients_in, entering,
            ctx.scale,
        )  # fmt: skip
        leaving_gradient, initial_gradient = pending.wait()
        dk, dv, taken_gradient, carries = source_gradients(
            q, k, v, do, taken_out, chunk_decay, weights_in, scores, gradients_in, key_scores,
            key_sums, sums, entering, final, leaving_gradient, ctx.scale,
        )  # fmt: skip
        del taken_out, gradients_in, leaving_gradient
        dg = decay_gradient(
            k, v, g, doc_ids, weights, gradients, exponents, taken_gradient, carries, key_products,
            value_products,
        )  # fmt: skip
        initial_gradient = initial_gradient if ctx.has_initial else None
        return dq, dk, dv, dg, initial_gradient, None, None, None


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Gated slot attention (arXiv:2409.07146, equations 6 to 8): softmax attention over M slots,
    each a gated mean of the keys and of the values.

        K_t = diag(exp g_t) K_{t-1} + (1 - exp g_t)ᵀ k_t      V_t likewise of v_t
        o_t = softmax(scale · q_t K_tᵀ) V_t

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, M], natural log of the slots' forget gates, at most 0.
        scale: 1/√K unless given.
        initial_state: [B, H, M, K + V] fp32, the slots' keys and values before the first token of
            the whole stream (of the first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, M, K + V] fp32: the state after the last
        token of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    check_attention("gsa", q, k, v, None, doc_ids)
    check_rank("gsa", "g", g, "B T H M")
    batch, length, heads, key_size = q.shape
    slots, width = g.shape[-1], key_size + v.shape[-1]
    check("gsa", "g", g, (batch, length, heads, slots), q)
    check("gsa", "initial_state", initial_state, (batch, heads, slots, width), q)
    scale = key_size**-0.5 if scale is None else scale
    if not (
        length >= SHORTEST and is_checked(q, key_size, v.shape[-1], CHECKED) and slots == SLOTS
    ):
        o, final_state = gsa_chunked(
            q, k, v, g, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
        )
        return o.to(v.dtype), final_state
    q, k, v, g = (rows_contiguous(x) for x in (q, k, v, g))
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    return SegmentedGSA.apply(q, k, v, g, initial_state, doc_ids, scale, on_gpu(scan))
