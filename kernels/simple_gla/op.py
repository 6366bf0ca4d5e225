"""Simple gated linear attention: the public function."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked, rows_contiguous
from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked
from fla_dist.kernels.simple_gla.settings import CHECKED
from fla_dist.kernels.simple_gla.steps import (
    decay_gradient,
    key_gradient,
    output,
    query_gradient,
    summarize,
    value_gradient,
)
from fla_dist.kernels.state import LOCAL, Diagonal, Scan


class SegmentedSimpleGLA(torch.autograd.Function):
    """Summarize the segments, join them, walk them; the backward mirrors it. Saves the states that
    enter segments, no others. step and skip: as fla_dist.kernels.simple_gla.steps has them."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, initial_state, doc_ids, scale, scan, step=None, skip=None):
        state, log_decay = summarize(k, v, g, step, doc_ids, 1.0, False)
        pending = scan.start(Diagonal(log_decay), state, initial_state)
        entering, final = pending.wait()
        ctx.save_for_backward(q, k, v, g, doc_ids, step, skip, entering)
        ctx.pending, ctx.scan, ctx.scale = pending, scan, scale
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return output(q, k, v, g, step, skip, doc_ids, entering, scale), final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        q, k, v, g, doc_ids, step, skip, entering = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else rows_contiguous(do)
        with_decay, scale = ctx.needs_input_grad[3], ctx.scale
        state_gradient, _ = summarize(q, do, g, step, doc_ids, scale, True)
        pending = ctx.scan.start(
            ctx.pending.transition, state_gradient, final_gradient, reverse_of=ctx.pending
        )
        dq, query_sums, borders = query_gradient(
            q, k, v, do, g, step, doc_ids, entering, scale, with_decay
        )
        leaving_gradient, initial_gradient = pending.wait()
        dk, *key_sums = key_gradient(
            q, k, v, do, g, step, doc_ids, leaving_gradient, borders, scale, with_decay
        )
        del borders
        dv, dstep, dskip = value_gradient(
            q, k, v, do, g, step, skip, doc_ids, leaving_gradient, scale
        )
        dg = None
        if with_decay:
            dg = decay_gradient(q, v, query_sums, *key_sums)
            dg = (dg.sum(dim=(0, 1)) if g.ndim == 1 else dg).to(g.dtype)
        return (
            dq, dk, dv, dg, initial_gradient if ctx.has_initial else None, None, None, None,
            None if step is None else dstep, None if skip is None else dskip,
        )  # fmt: skip


def has_kernels(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    checked: Collection[tuple[torch.dtype, int, int]] = CHECKED,
) -> bool:
    """Whether the kernels serve these arguments; the reference serves the others."""
    if not is_checked(q, q.shape[-1], v.shape[-1], checked):
        return False
    return g is None or g.ndim == 3 or not (g.requires_grad and torch.is_grad_enabled())


def scalar_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    scan: Scan,
) -> tuple[Tensor, Tensor]:
    """What simple GLA, retention and linear attention have in common, once their arguments are
    checked."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not has_kernels(q, v, g):
        o, final_state = simple_gla_chunked(
            q, k, v, g, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
        )
        return o.to(v.dtype), final_state
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    return SegmentedSimpleGLA.apply(q, k, v, g, initial_state, doc_ids, scale, on_gpu(scan))


def simple_gla(
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
    """Gated linear attention with one decay a head and token (arXiv:2312.06635 with a scalar gate;
    the core of Mamba-2).

        S_t = exp(g_t) S_{t-1} + k_tᵀ v_t        o_t = scale · q_t S_t

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H], natural log of the decay, at most 0.
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
    check_attention("simple_gla", q, k, v, initial_state, doc_ids)
    check("simple_gla", "g", g, tuple(q.shape[:3]), q)
    return scalar_decay_attention(
        q, k, v, g, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
    )
