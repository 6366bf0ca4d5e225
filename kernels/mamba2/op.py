"""Mamba-2's state space dual: the public function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked, rows_contiguous
from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.mamba2.reference import of_heads
from fla_dist.kernels.mamba2.settings import CHECKED
from fla_dist.kernels.mamba2.steps import (
    chunk_state_gradients,
    chunk_states,
    gradient,
    output,
    prepare,
    summarize,
    summarize_gradient,
)
from fla_dist.kernels.simple_gla import simple_gla
from fla_dist.kernels.state import LOCAL, Diagonal, Scan


class SegmentedStateSpaceDual(torch.autograd.Function):
    """Summarize the segments, join them, write the states at chunks' borders and take every chunk
    from there; the backward mirrors it. Saves the states that enter segments. The arguments' names
    are those of fla_dist.kernels.mamba2.steps."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, step, skip, initial_state, doc_ids, scan):
        sums, numbers, chunk_log = prepare(q, v, g, step, doc_ids)
        state, log_decay = summarize(k, v, numbers, chunk_log)
        pending = scan.start(Diagonal(log_decay), state, initial_state)
        entering, final = pending.wait()
        borders = chunk_states(k, v, numbers, chunk_log, entering)
        ctx.save_for_backward(q, k, v, sums, numbers, chunk_log, skip, doc_ids, entering)
        ctx.pending, ctx.scan = pending, scan
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return output(q, k, v, sums, numbers, skip, doc_ids, *borders), final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        q, k, v, sums, numbers, chunk_log, skip, doc_ids, entering = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else rows_contiguous(do)
        state = summarize_gradient(q, do, numbers, chunk_log)
        pending = ctx.scan.start(
            ctx.pending.transition, state, final_gradient, reverse_of=ctx.pending
        )
        borders = chunk_states(k, v, numbers, chunk_log, entering)
        leaving, initial_gradient = pending.wait()
        gradients = chunk_state_gradients(q, do, numbers, chunk_log, leaving, *borders)
        del state, leaving
        *d_all, dskip = gradient(q, k, v, do, sums, numbers, skip, doc_ids, *borders, *gradients)
        return (
            *d_all, None if skip is None else dskip,
            initial_gradient if ctx.has_initial else None, None, None,
        )  # fmt: skip


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels serve these arguments; simple GLA serves the others."""
    return is_checked(q, q.shape[-1], v.shape[-1], CHECKED)


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's selective state space with one decay a head (arXiv:2405.21060, section 5).

        Δ_t = softplus(dt_t + dt_bias)                                  (dt_t without dt_bias)
        h_t = exp(Δ_t A) h_{t-1} + B_tᵀ (Δ_t x_t)
        y_t = C_t h_t + D x_t                                           (without D: C_t h_t)

    Args:
        x: [B, T, H, P], bf16 | fp16 | fp32 | fp64.      dt: [B, T, H].
        A: [H] fp32, negative.      B, C: [B, T, G, N] in x's dtype; heads h H/G to (h+1) H/G - 1
            share group h.
        dt_bias: [H] fp32. With it, dt is what softplus turns into Δ; without it, dt is Δ itself,
            not negative.
        D: [H] fp32, how much of x goes past the state; none unless given.
        initial_state: [B, H, N, P] fp32, the state before the first token of the whole stream (of
            the first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        y [B, T, H, P] in x's dtype, final_state [B, H, N, P] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    op = "state_space_dual"
    check_rank(op, "x", x, "B T H P")
    check_rank(op, "B", B, "B T G N")
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"{op}: B has {groups} groups, expected a divisor of x's {heads} heads")
    check(op, "dt", dt, (batch, length, heads), x)
    check(op, "A", A, (heads,), x)
    check(op, "B", B, (batch, length, groups, size), x)
    check(op, "C", C, (batch, length, groups, size), x)
    check(op, "dt_bias", dt_bias, (heads,), x)
    check(op, "D", D, (heads,), x)
    check(op, "initial_state", initial_state, (batch, heads, size, width), x)
    check(op, "doc_ids", doc_ids, (batch, length), x)
    for name, y in (("B", B), ("C", C)):
        if y.dtype != x.dtype:
            raise ValueError(f"{op}: {name} is {y.dtype}, expected x's {x.dtype}")
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    served = has_kernels(C, x)
    if served:
        dt = dt.transpose(1, 2).contiguous().transpose(1, 2)  # kernels read a head's tokens
    dt = dt if dt_bias is None else F.softplus(dt + dt_bias)
    # The paper's section 4: C is attention's query, B its key, Δ x its value, Δ A its log decay.
    log_decay = dt * A
    if served:
        C, B, x = rows_contiguous(C), rows_contiguous(B), rows_contiguous(x)
        doc_ids = None if doc_ids is None else doc_ids.contiguous()
        D = None if D is None else D.float()
        return SegmentedStateSpaceDual.apply(
            C, B, x, log_decay, dt, D, initial_state, doc_ids, on_gpu(scan)
        )
    y, state = simple_gla(
        of_heads(C, heads), of_heads(B, heads), (dt[..., None] * x).to(x.dtype), log_decay,
        scale=1.0, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return y if D is None else (y + D[:, None] * x).to(x.dtype), state
