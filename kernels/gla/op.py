"""Gated linear attention: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked, rows_contiguous
from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.gla.reference import gla_chunked
from fla_dist.kernels.gla.settings import CHECKED
from fla_dist.kernels.gla.steps import backward, output, prepare, query_gradient, summarize
from fla_dist.kernels.state import LOCAL, Diagonal, Scan


class SegmentedGLA(torch.autograd.Function):
    """Prepare the chunks, summarize the segments, join them, walk them; the backward mirrors it.
    Saves what was prepared, and the states that enter segments.

    k: None for 1 - exp(g).  bonus: [H, K] fp32, with which a token reads the state before it, and
    itself through the bonus (RWKV6); or None."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, bonus, initial_state, doc_ids, scale, scan):
        q_in, k_out, chunk_decay, scores = prepare(q, k, v, g, bonus, doc_ids, scale)
        state, log_decay = summarize(k_out, v, chunk_decay, False)
        pending = scan.start(Diagonal(log_decay), state, initial_state)
        entering, final = pending.wait()
        prepared = q_in, k_out, chunk_decay, scores
        ctx.save_for_backward(q, k, v, g, bonus, doc_ids, *prepared, entering, final)
        ctx.pending, ctx.scan, ctx.scale = pending, scan, scale
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return output(q_in, k_out, v, chunk_decay, scores, entering), final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        q, k, v, g, bonus, doc_ids, *prepared, entering, final = ctx.saved_tensors
        q_in, k_out, chunk_decay, _ = prepared
        do = torch.zeros_like(v) if do is None else rows_contiguous(do)
        state_gradient, _ = summarize(q_in, do, chunk_decay, True)
        joined = ctx.scan.start(
            ctx.pending.transition, state_gradient, final_gradient, reverse_of=ctx.pending
        )
        outer_dq, *of_chunks = query_gradient(do, v, q_in, k_out, chunk_decay, entering, ctx.scale)
        leaving_gradient, initial_gradient = joined.wait()
        dq, dk, dv, dg, bonus_gradient = backward(
            q, k, v, do, g, bonus, doc_ids, *prepared, outer_dq, *of_chunks, entering, final,
            leaving_gradient, ctx.scale,
        )  # fmt: skip
        return (
            dq, None if k is None else dk, dv, dg,
            None if bonus is None else bonus_gradient.sum(dim=(0, 2)),
            initial_gradient if ctx.has_initial else None, None, None, None,
        )  # fmt: skip


def segmented_gla(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    scan: Scan,
) -> tuple[Tensor, Tensor]:
    """`SegmentedGLA` for tensors of any strides."""
    q, v, g = (rows_contiguous(x) for x in (q, v, g))
    k = None if k is None else rows_contiguous(k)
    bonus = None if bonus is None else bonus.float().contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    return SegmentedGLA.apply(q, k, v, g, bonus, initial_state, doc_ids, scale, on_gpu(scan))


def gla(
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
    """Gated linear attention (arXiv:2312.06635, eq. 3).

        S_t = diag(exp g_t) S_{t-1} + k_tᵀ v_t        o_t = scale · q_t S_t

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, K], natural log of the decay, at most 0.
        scale: 1/√K unless given.
        initial_state: [B, H, K, V] fp32, the state before the first token of the whole stream (of
            the first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, K, V] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_attention("gla", q, k, v, initial_state, doc_ids)
    check("gla", "g", g, tuple(q.shape), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_checked(q, q.shape[-1], v.shape[-1], CHECKED):
        return segmented_gla(
            q, k, v, g, None,
            scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    o, final_state = gla_chunked(
        q, k, v, g, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
    )
    return o.to(v.dtype), final_state
