"""HGRN's recurrence: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.common.launch import capability, rows_contiguous
from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.hgrn.reference import hgrn_chunked
from fla_dist.kernels.hgrn.steps import backward, forward
from fla_dist.kernels.state import LOCAL, RESET, Diagonal, Scan

CHECKED = {
    (dtype, gate)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for gate in (dtype, torch.float32)
}
"""The dtypes of x and g for which the kernels were checked on a GPU; the reference serves
others."""


class SegmentedHGRN(torch.autograd.Function):
    """One launch each way. A scan over ranks sees one stretch, the slice: its map takes a launch
    more each way."""

    @staticmethod
    def forward(ctx: Any, x, g, initial_state, doc_ids, scan):
        starts = None if doc_ids is None else document_starts(doc_ids)
        entering, ctx.pending = initial_state, None
        if scan is not LOCAL:
            _, leaving = forward(x, g, starts, None, False)
            log_decay = g.sum(dim=1, dtype=torch.float32)
            if starts is not None:
                log_decay = log_decay.masked_fill(starts.any(dim=1, keepdim=True), RESET)
            ctx.pending = scan.start(
                Diagonal(log_decay.unsqueeze(1)), leaving.unsqueeze(1), initial_state
            )
            entries, final = ctx.pending.wait()
            entering = entries[:, 0].contiguous()
        h, local_final = forward(x, g, starts, entering, True)
        ctx.save_for_backward(x, g, h, starts, entering)
        ctx.scan, ctx.has_initial = scan, initial_state is not None
        ctx.set_materialize_grads(False)
        return h, local_final if scan is LOCAL else final

    @staticmethod
    def backward(ctx: Any, dh, final_gradient):
        x, g, h, starts, entering = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else rows_contiguous(dh)
        if final_gradient is not None:
            final_gradient = final_gradient.contiguous()
        if ctx.pending is None:
            dx, dg, initial_gradient = backward(x, g, h, dh, starts, entering, final_gradient, True)
        else:
            _, _, gradient = backward(x, g, h, dh, starts, entering, None, False)
            entries, initial_gradient = ctx.scan.start(
                ctx.pending.transition, gradient.unsqueeze(1), final_gradient,
                reverse_of=ctx.pending,
            ).wait()  # fmt: skip
            leaving = entries[:, 0].contiguous()
            dx, dg, _ = backward(x, g, h, dh, starts, entering, leaving, True)
        return dx, dg, initial_gradient if ctx.has_initial else None, None, None


def segmented_hgrn(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """`hgrn` by the Triton kernels; its arguments are checked."""
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    return SegmentedHGRN.apply(rows_contiguous(x), rows_contiguous(g), initial_state, doc_ids, scan)


def hgrn(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Gated elementwise recurrence (arXiv:2311.04823, equation 4 with real gates).

        h_t = exp(g_t) ⊙ h_{t-1} + (1 - exp g_t) ⊙ x_t

    Args:
        x: [B, T, D], bf16 | fp16 | fp32 | fp64.
        g: [B, T, D], natural log of the forget gate, at most 0.
        initial_state: [B, D] fp32, the state before the first token of the whole stream (of the
            first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        h [B, T, D] in x's dtype, final_state [B, D] fp32: the state after the last token of this
        slice.

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("hgrn", "x", x, "B T D")
    check("hgrn", "g", g, tuple(x.shape), x)
    check("hgrn", "initial_state", initial_state, (x.shape[0], x.shape[2]), x)
    check("hgrn", "doc_ids", doc_ids, tuple(x.shape[:2]), x)
    if capability(x) == 90 and (x.dtype, g.dtype) in CHECKED:
        return segmented_hgrn(x, g, initial_state=initial_state, doc_ids=doc_ids, scan=scan)
    h, final_state = hgrn_chunked(x, g, initial_state=initial_state, doc_ids=doc_ids, scan=scan)
    return h.to(x.dtype), final_state
