"""The gated delta rule: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked, rows_contiguous
from fla_dist.kernels.common.segments import one_segment
from fla_dist.kernels.common.validation import check, check_attention, check_rank
from fla_dist.kernels.gated_delta_rule.reference import gated_delta_rule_chunked
from fla_dist.kernels.gated_delta_rule.settings import CHECKED, SHORTEST
from fla_dist.kernels.gated_delta_rule.steps import (
    gradients,
    output,
    prepare,
    segments,
    summarize,
    summarize_gradient,
)
from fla_dist.kernels.state import LOCAL, Dense, Scan


class SegmentedGatedDeltaRule(torch.autograd.Function):
    """Solve the chunks, summarize the segments, join them, walk them; the backward mirrors it. One
    segment that no other process continues is walked without a summary. keep: what only a backward
    needs."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, beta, initial_state, doc_ids, scale, scan, keep):
        inverse, scores, weights, through = prepare(q, k, v, g, beta, doc_ids, scale)
        pending = None
        if scan is LOCAL and segments(q, v) == 1:
            entering = one_segment(initial_state, q, v)
        else:
            state, transition = summarize(k, v, weights, through, inverse)
            pending = on_gpu(scan).start(Dense(transition), state, initial_state)
            entering, _ = pending.wait()
        o, written, states, final = output(
            q, k, v, weights, through, inverse, scores, entering, scale,
            keep and any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.save_for_backward(q, k, doc_ids, inverse, scores, weights, through, written, states)
        ctx.pending, ctx.scan, ctx.scale = pending, scan, scale
        ctx.gate_dtypes = None if g is None else g.dtype, beta.dtype
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        q, k, doc_ids, inverse, scores, weights, through, written, states = ctx.saved_tensors
        do = torch.zeros_like(written) if do is None else rows_contiguous(do)
        from_scan = None
        if ctx.pending is None:
            leaving_gradient = one_segment(final_gradient, q, written)
        else:
            pending = on_gpu(ctx.scan).start(
                ctx.pending.transition,
                summarize_gradient(q, k, do, weights, through, inverse, scores, ctx.scale),
                final_gradient,
                reverse_of=ctx.pending,
            )
            leaving_gradient, from_scan = pending.wait()
        gate_dtype, beta_dtype = ctx.gate_dtypes
        dq, dk, dv, dg, dbeta, initial_gradient = gradients(
            q, k, do, written, states, weights, through, inverse, scores, doc_ids,
            leaving_gradient, ctx.scale, gate_dtype is not None,
        )  # fmt: skip
        group = written.shape[2] // q.shape[2]
        if group > 1:
            dq, dk = (x.unflatten(2, (-1, group)).sum(3) for x in (dq, dk))
        if from_scan is not None:
            initial_gradient = from_scan
        return (
            dq, dk, dv, None if gate_dtype is None else dg.to(gate_dtype), dbeta.to(beta_dtype),
            initial_gradient if ctx.has_initial else None, None, None, None, None,
        )  # fmt: skip


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels serve these arguments; the reference serves the others."""
    return is_checked(q, q.shape[-1], v.shape[-1], CHECKED) and q.shape[1] >= SHORTEST


def segmented_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, or without g the delta rule, by the Triton kernels; its arguments are
    checked."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    return SegmentedGatedDeltaRule.apply(
        q, k, v, g, beta, initial_state, doc_ids, scale, scan, torch.is_grad_enabled()
    )


def gated_delta_rule(
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
    """The gated delta rule (arXiv:2412.06464, eq. 10).

        S_t = exp(g_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    Args:
        q, k: [B, T, Hk, K], bf16 | fp16 | fp32 | fp64; k of length 1, else the state may grow.
            H is a multiple of Hk: key head i serves the value heads i·H/Hk and those that follow.
        v: [B, T, H, V].      g: [B, T, H], natural log of the decay, at most 0.
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
    check_rank("gated_delta_rule", "q", q, "B T H K")
    check_rank("gated_delta_rule", "v", v, "B T H V")
    check("gated_delta_rule", "k", k, tuple(q.shape), q)
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"gated_delta_rule: v has {v.shape[2]} heads, expected a multiple of q's {q.shape[2]}"
        )
    group = v.shape[2] // q.shape[2]
    shared = (x[:, :, :1].expand(-1, -1, v.shape[2], -1) for x in (q, k))
    check_attention("gated_delta_rule", *shared, v, initial_state, doc_ids)
    check("gated_delta_rule", "g", g, tuple(v.shape[:3]), q)
    check("gated_delta_rule", "beta", beta, tuple(v.shape[:3]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if has_kernels(q, v):
        return segmented_gated_delta_rule(
            q, k, v, g, beta,
            scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    o, final_state = gated_delta_rule_chunked(
        q, k, v, g, beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return o.to(v.dtype), final_state
