"""Kimi delta attention: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked, rows_contiguous
from fla_dist.kernels.common.segments import one_segment
from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.kda.reference import kda_chunked
from fla_dist.kernels.kda.settings import CHECKED, SHORTEST
from fla_dist.kernels.kda.steps import (
    key_gradient,
    output,
    prepare,
    segments,
    summarize,
    summarize_gradient,
    value_gradient,
)
from fla_dist.kernels.state import LOCAL, Dense, Scan


class SegmentedKDA(torch.autograd.Function):
    """Prepare the chunks, summarize the segments, join them, walk them; the backward mirrors it.
    One segment that no other process continues is walked without a summary."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, beta, initial_state, doc_ids, scale, scan):
        q_in, k_in, k_out, through, scores, inverse = prepare(q, k, v, g, beta, doc_ids, scale)
        pending = None
        if scan is LOCAL and segments(k, v) == 1:
            entering = one_segment(initial_state, k, v)
        else:
            state, transition = summarize(k_in, k_out, v, through, inverse)
            pending = on_gpu(scan).start(Dense(transition), state, initial_state)
            entering, _ = pending.wait()
        o, residual, final = output(q_in, k_in, k_out, v, through, scores, inverse, entering)
        ctx.save_for_backward(
            q, k, g, beta, doc_ids, q_in, k_in, k_out, through, scores, inverse, residual,
            entering, final,
        )  # fmt: skip
        ctx.pending, ctx.scan, ctx.scale = pending, scan, scale
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        (
            q, k, g, beta, doc_ids, q_in, k_in, k_out, through, scores, inverse, residual,
            entering, final,
        ) = ctx.saved_tensors  # fmt: skip
        do = torch.zeros_like(residual) if do is None else rows_contiguous(do)
        solved = q_in, k_in, k_out, do, through, scores, inverse
        from_scan = None
        if ctx.pending is None:
            leaving_gradient = one_segment(final_gradient, k, residual)
        else:
            leaving_gradient, from_scan = (
                on_gpu(ctx.scan)
                .start(
                    ctx.pending.transition, summarize_gradient(*solved), final_gradient,
                    reverse_of=ctx.pending,
                )
                .wait()
            )  # fmt: skip
        dv, initial_gradient = value_gradient(*solved, leaving_gradient)
        dq, dk, dg, dbeta = key_gradient(
            q, k, g, beta, doc_ids, q_in, k_in, k_out, through, residual, do, dv, entering, final,
            leaving_gradient, ctx.scale,
        )  # fmt: skip
        if from_scan is not None:
            initial_gradient = from_scan
        return (
            dq, dk, dv, dg, dbeta.to(beta.dtype), initial_gradient if ctx.has_initial else None,
            None, None, None,
        )  # fmt: skip


def segmented_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """KDA by the Triton kernels; its arguments are checked."""
    q, k, v, g = (rows_contiguous(x) for x in (q, k, v, g))
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    return SegmentedKDA.apply(q, k, v, g, beta, initial_state, doc_ids, scale, scan)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Kimi delta attention (arXiv:2510.26692, eq. 1).

        S_t = (I - beta_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ
        o_t = scale · S_tᵀ q_t

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64; k of length 1, else the state may grow.
        v: [B, T, H, V].      g: [B, T, H, K], natural log of the decay, at most 0.
        beta: [B, T, H], 0 to 1, or to 2 for negative eigenvalues.
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
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
            expected.
    """
    check_attention("kda", q, k, v, initial_state, doc_ids)
    check("kda", "g", g, tuple(q.shape), q)
    check("kda", "beta", beta, tuple(q.shape[:3]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_checked(q, q.shape[-1], v.shape[-1], CHECKED) and q.shape[1] >= SHORTEST:
        return segmented_kda(
            q, k, v, g, beta,
            scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    o, final_state = kda_chunked(
        q, k, v, g, beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return o.to(v.dtype), final_state
