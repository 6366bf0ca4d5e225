"""Depthwise causal convolution in plain PyTorch: the truth, and the CPU backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left_context: Tensor,
    positions: Tensor,
    silu: bool = False,
) -> Tensor:
    """y_t = bias + Σ_{j < W, j ≤ positions_t} weight[:, W-1-j] x_{t-j}; one shifted product for
    each tap. In the wider of x's and the weight's dtype."""
    width = weight.shape[1]
    length = x.shape[1]
    extended = torch.cat([left_context, x], dim=1)
    output = x * weight[:, width - 1]
    for j in range(1, width):
        shifted = extended[:, width - 1 - j : width - 1 - j + length]
        output = output + shifted * (positions >= j)[..., None] * weight[:, width - 1 - j]
    output = output if bias is None else output + bias
    return F.silu(output) if silu else output
