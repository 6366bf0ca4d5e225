"""Mamba's selective scan: the public functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.launch import capability, rows_contiguous
from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.mamba.reference import selective_scan_chunked
from fla_dist.kernels.mamba.triton_backward import backward, summarize_gradient
from fla_dist.kernels.mamba.triton_forward import LOG2_E, fold, output, summarize
from fla_dist.kernels.state import LOCAL, Diagonal, Scan

LARGEST_STATE = 64
"""N up to which the kernels were checked on a GPU (compute capability 9.0)."""


def _has_kernels(x: Tensor, dt: Tensor, size: int) -> bool:
    """Whether the kernels were checked for these arguments; the reference serves the others."""
    dtypes = dt.dtype == x.dtype or (x.dtype, dt.dtype) == (torch.bfloat16, torch.float32)
    return capability(x) == 90 and x.dtype != torch.float64 and dtypes and size <= LARGEST_STATE


class SegmentedSelectiveScan(torch.autograd.Function):
    """Summarize the segments, join them, walk them; the backward mirrors it.

    A scan over ranks sees one stretch: the slice, folded. The states that the walk keeps for the
    backward are those before every 16th token. With the projections around the scan, what lies
    between it and them is not kept: of Δ's argument the backward makes a second one, y it gets from
    the walk back.
    """

    @staticmethod
    def forward(
        ctx: Any, x, dt, A, B, C, dt_weight, dt_bias, D, z, weight, initial_state, doc_ids, scan,
        keep,
    ):  # fmt: skip
        rate = A.float() * LOG2_E
        B_rows, C_rows = B.float().contiguous(), C.float().contiguous()
        bias = None if dt_bias is None else dt_bias.float().contiguous()
        skip = rate.new_zeros(rate.shape[0]) if D is None else D.float().contiguous()
        steps = dt if dt_weight is None else F.linear(dt, dt_weight)
        state, log_decay = summarize(x, steps, rate, B_rows, bias, doc_ids)
        if scan is LOCAL:
            ctx.pending = None
            entries, final = fold(log_decay, rate, state, initial_state, False)
        else:
            _, leaving = fold(log_decay, rate, state, None, False)
            slice_decay = Diagonal(log_decay.sum(dim=1, keepdim=True), A.float())
            ctx.pending = scan.start(slice_decay, leaving.unsqueeze(1), initial_state)
            entering, final = ctx.pending.wait()
            entries, _ = fold(log_decay, rate, state, entering[:, 0].contiguous(), False)
        y, checkpoints = output(
            x, steps, rate, B_rows, C_rows, bias, skip, z, doc_ids, entries, keep
        )
        ctx.save_for_backward(
            x, dt, rate, B_rows, C_rows, dt_weight, bias, skip, z, weight, doc_ids, log_decay,
            checkpoints,
        )  # fmt: skip
        ctx.scan = scan
        ctx.dtypes = [None if p is None else p.dtype for p in (A, B, C, dt_bias, D)]
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return y if weight is None else F.linear(y, weight), final

    @staticmethod
    def backward(ctx: Any, dout, final_gradient):
        (
            x, dt, rate, B, C, dt_weight, bias, skip, z, weight, doc_ids, log_decay, checkpoints
        ) = ctx.saved_tensors  # fmt: skip
        if dout is None:
            dy = torch.zeros_like(x)
        else:
            dy = rows_contiguous(dout if weight is None else dout @ weight)
        if final_gradient is not None:
            final_gradient = final_gradient.contiguous()
        steps = dt if dt_weight is None else project_again(dt, dt_weight)
        state = summarize_gradient(steps, rate, C, dy, bias, z, doc_ids)
        if ctx.pending is None:
            leaving, initial_gradient = fold(log_decay, rate, state, final_gradient, True)
        else:
            _, entering = fold(log_decay, rate, state, None, True)
            reverse = ctx.scan.start(
                ctx.pending.transition,
                entering.unsqueeze(1),
                final_gradient,
                reverse_of=ctx.pending,
            )
            from_others, initial_gradient = reverse.wait()
            leaving, _ = fold(log_decay, rate, state, from_others[:, 0].contiguous(), True)
        del state
        dx, ddt, *parameters, dz, y = backward(
            x, steps, rate, B, C, bias, skip, z, dy, doc_ids, checkpoints, leaving,
            weight is not None,
        )  # fmt: skip
        dA, dB, dC, dbias, dskip = (
            None if dtype is None else gradient.to(dtype)
            for gradient, dtype in zip(parameters, ctx.dtypes, strict=True)
        )
        dweight = ddt_weight = None
        if weight is not None and dout is not None:
            dweight = dout.flatten(0, 1).t() @ y.flatten(0, 1)
        if dt_weight is not None:
            ddt_weight = ddt.flatten(0, 1).t() @ dt.flatten(0, 1)
            ddt = ddt @ dt_weight
        return (
            dx, ddt, dA, dB, dC, ddt_weight, dbias, dskip, None if z is None else dz, dweight,
            initial_gradient if ctx.has_initial else None, None, None, None,
        )  # fmt: skip


@torch.library.custom_op("fla_dist::selective_scan_project_again", mutates_args=())
def project_again(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of [B, T, R] and [D, R]: an op of its own, so that torch.compile does not take the
    forward's product for it and keep that."""
    return F.linear(x, weight)


@project_again.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def segmented_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`, or with both weights `projected_selective_scan`, by the Triton kernels; the
    arguments are checked."""
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    keep = torch.is_grad_enabled() and any(
        y is not None and y.requires_grad
        for y in (x, dt, A, B, C, dt_weight, dt_bias, D, z, weight, initial_state)
    )
    return SegmentedSelectiveScan.apply(
        rows_contiguous(x), rows_contiguous(dt), A, B, C,
        None if dt_weight is None else dt_weight.to(dt.dtype), dt_bias, D,
        None if z is None else rows_contiguous(z),
        None if weight is None else weight.to(x.dtype), initial_state,
        None if doc_ids is None else doc_ids.contiguous(), scan, keep,
    )  # fmt: skip


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Selective state space (arXiv:2312.00752, algorithm 2), every channel with its own state of N
    numbers.

        Δ_t = softplus(dt_t + dt_bias)                                  (dt_t without dt_bias)
        h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t x_t B_t
        y_t = (h_t · C_t + D ⊙ x_t) ⊙ silu(z_t)                         (without D, z: h_t · C_t)

    Args:
        x: [B, T, D], bf16 | fp16 | fp32 | fp64.      dt: [B, T, D].
        A: [D, N] fp32, negative.      B, C: [B, T, N].
        dt_bias: [D] fp32. With it, dt is what softplus turns into Δ; without it, dt is Δ itself,
            not negative.
        D: [D] fp32, how much of x goes past the state; none unless given.
        z: [B, T, D] in x's dtype, the gate of the output; none unless given.
        initial_state: [B, D, N] fp32, the state before the first token of the whole stream (of the
            first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        y [B, T, D] in x's dtype, final_state [B, D, N] fp32: the state after the last token of this
        slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    check_rank("selective_scan", "x", x, "B T D")
    check("selective_scan", "dt", dt, tuple(x.shape), x)
    _check("selective_scan", x, A, B, C, dt_bias, D, z, initial_state, doc_ids)
    function = (
        segmented_selective_scan if _has_kernels(x, dt, A.shape[1]) else selective_scan_chunked
    )
    y, final_state = function(
        x, dt, A, B, C, dt_bias=dt_bias, D=D, z=z,
        initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return y.to(x.dtype), final_state


def projected_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_weight: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    z: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` between the projections of its layer, o_t = y_t Wᵀ with Δ's argument
    dt_t W_dtᵀ + dt_bias: neither y nor that argument is kept for the backward.

    Args:
        x, A, B, C, D, z, initial_state, doc_ids, scan: as selective_scan's.
        dt: [B, T, R] in x's dtype.      dt_weight: [D, R].      dt_bias: [D].
        weight: [E, D], the output's.

    Returns:
        o [B, T, E] in x's dtype, final_state [B, D, N] fp32.

    Raises:
        ValueError: as selective_scan.
    """
    op = "projected_selective_scan"
    check_rank(op, "x", x, "B T D")
    check_rank(op, "dt_weight", dt_weight, "D R")
    batch, length, channels = x.shape
    check(op, "dt_weight", dt_weight, (channels, dt_weight.shape[1]), x)
    check(op, "dt", dt, (batch, length, dt_weight.shape[1]), x)
    check(op, "weight", weight, (weight.shape[0], channels), x)
    _check(op, x, A, B, C, dt_bias, D, z, initial_state, doc_ids)
    if _has_kernels(x, dt, A.shape[1]):
        return segmented_selective_scan(
            x, dt, A, B, C, dt_weight=dt_weight, dt_bias=dt_bias, D=D, z=z, weight=weight,
            initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    y, final_state = selective_scan_chunked(
        x, F.linear(dt, dt_weight), A, B, C, dt_bias=dt_bias, D=D, z=z,
        initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return F.linear(y.to(x.dtype), weight), final_state


def _check(
    op: str, x: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, D: Tensor | None,
    z: Tensor | None, initial_state: Tensor | None, doc_ids: Tensor | None,
) -> None:  # fmt: skip
    """Of what both functions take."""
    check_rank(op, "A", A, "D N")
    batch, length, channels = x.shape
    size = A.shape[1]
    check(op, "A", A, (channels, size), x)
    check(op, "B", B, (batch, length, size), x)
    check(op, "C", C, (batch, length, size), x)
    check(op, "dt_bias", dt_bias, (channels,), x)
    check(op, "D", D, (channels,), x)
    check(op, "z", z, (batch, length, channels), x)
    check(op, "initial_state", initial_state, (batch, channels, size), x)
    check(op, "doc_ids", doc_ids, (batch, length), x)
    if z is not None and z.dtype != x.dtype:
        raise ValueError(f"{op}: z is {z.dtype}, expected x's {x.dtype}")
