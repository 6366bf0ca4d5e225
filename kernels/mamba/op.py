"""Mamba's selective scan: the public function."""

from __future__ import annotations

from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.mamba.reference import selective_scan_chunked
from fla_dist.kernels.state import LOCAL, Scan
from torch import Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Selective state space (arXiv:2312.00752, algorithm 2), every channel with its own state of N
    numbers.

        h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t x_t B_t        y_t = h_t · C_t

    Args:
        x: [B, T, D], bf16 | fp16 | fp32 | fp64.      dt: [B, T, D], Δ, positive (after its
            softplus).
        A: [D, N] fp32, negative.      B, C: [B, T, N].
        initial_state: [B, D, N] fp32, the state before the first token of the whole stream (of the
            first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        y [B, T, D] in x's dtype, final_state [B, D, N] fp32: the state after the last token of this
        slice.

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("selective_scan", "x", x, "B T D")
    check_rank("selective_scan", "A", A, "D N")
    batch, length, channels = x.shape
    size = A.shape[1]
    check("selective_scan", "dt", dt, (batch, length, channels), x)
    check("selective_scan", "A", A, (channels, size), x)
    check("selective_scan", "B", B, (batch, length, size), x)
    check("selective_scan", "C", C, (batch, length, size), x)
    check("selective_scan", "initial_state", initial_state, (batch, channels, size), x)
    check("selective_scan", "doc_ids", doc_ids, (batch, length), x)
    output, final_state = selective_scan_chunked(
        x, dt, A, B, C, initial_state=initial_state, doc_ids=doc_ids, scan=scan
    )
    return output.to(x.dtype), final_state
