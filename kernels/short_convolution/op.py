"""Short convolution: the public function."""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.short_convolution.reference import short_convolution_reference


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, left_context: Tensor, positions: Tensor
) -> Tensor:
    """Depthwise causal convolution over time that never looks beyond the start of a document.

        y_t = bias + Σ_{j < W, j ≤ positions_t} weight[:, W-1-j] ⊙ x_{t-j}

    Args:
        x: [B, T, D].      weight: [D, W].      bias: [D] or None.
        left_context: [B, W-1, D], the tokens before x; zeros at a stream's start.
        positions: [B, T] integer, each token's position in its document.

    Returns:
        y [B, T, D].

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("short_convolution", "x", x, "B T D")
    check_rank("short_convolution", "weight", weight, "D W")
    batch, length, channels = x.shape
    width = weight.shape[1]
    check("short_convolution", "weight", weight, (channels, width), x)
    check("short_convolution", "bias", bias, (channels,), x)
    check("short_convolution", "left_context", left_context, (batch, width - 1, channels), x)
    check("short_convolution", "positions", positions, (batch, length), x)
    return short_convolution_reference(x, weight, bias, left_context, positions)
