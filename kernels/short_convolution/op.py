"""Short convolution: the public function."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fla_dist.kernels.common.launch import capability, rows_contiguous
from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.short_convolution.reference import short_convolution_reference
from fla_dist.kernels.short_convolution.triton_kernels import convolution

CHECKED = (2, 3, 4)
"""Widths at which the kernels were checked on a GPU (compute capability 9.0)."""


def triton_short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, left_context: Tensor, positions: Tensor,
    silu: bool = False,
) -> Tensor:  # fmt: skip
    """The kernels, for arguments that are checked."""
    bias = None if bias is None else bias.contiguous()
    return convolution(
        rows_contiguous(x), weight.contiguous(), bias, left_context.to(x.dtype).contiguous(),
        positions.contiguous(), silu,
    )  # fmt: skip


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    left_context: Tensor,
    positions: Tensor,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """Depthwise causal convolution over time that never looks beyond the start of a document.

        y_t = bias + Σ_{j < W, j ≤ positions_t} weight[:, W-1-j] ⊙ x_{t-j}        (then silu)

    Args:
        x: [B, T, D], bf16 | fp16 | fp32 | fp64.      weight: [D, W].      bias: [D] or None.
        left_context: [B, W-1, D], the tokens before x; zeros at a stream's start.
        positions: [B, T] integer, each token's position in its document.
        activation: "silu" or None.

    Returns:
        y [B, T, D] in x's dtype; sums are fp32, or fp64 where x is.

    Raises:
        ValueError: an activation there is not, or shapes or devices that do not fit, naming the
        argument and what was expected.
    """
    check_rank("short_convolution", "x", x, "B T D")
    check_rank("short_convolution", "weight", weight, "D W")
    batch, length, channels = x.shape
    width = weight.shape[1]
    check("short_convolution", "weight", weight, (channels, width), x)
    check("short_convolution", "bias", bias, (channels,), x)
    check("short_convolution", "left_context", left_context, (batch, width - 1, channels), x)
    check("short_convolution", "positions", positions, (batch, length), x)
    if activation not in ("silu", None):
        raise ValueError(f"short_convolution: activation is {activation!r}, expected silu or None")
    silu = activation == "silu"
    if capability(x) == 90 and width in CHECKED and x.dtype != torch.float64:
        return triton_short_convolution(x, weight, bias, left_context, positions, silu)
    wide = torch.promote_types(x.dtype, torch.float32)
    return short_convolution_reference(
        x.to(wide), weight, bias, left_context.to(wide), positions, silu
    ).to(x.dtype)
