"""SwiGLU and the projection after it, in one: the public function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.launch import capability
from fla_dist.kernels.common.validation import check
from fla_dist.kernels.swiglu.triton_kernels import swiglu, swiglu_backward

CHECKED = (90,)
"""Compute capabilities at which the kernels were checked on a GPU; plain PyTorch serves others."""


def triton_swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """The kernels, for arguments that are checked."""
    rows = gate_up.flatten(0, -2).contiguous()
    y = SwiGLULinear.apply(rows, weight.to(gate_up.dtype))
    return y.unflatten(0, gate_up.shape[:-1])


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """y = (silu(gate) ⊙ up) Wᵀ (arXiv:2002.05202), of which only gate and up are kept for the
    backward; it makes silu(gate) ⊙ up again in the pass that makes their gradients.

    Args:
        gate_up: [..., 2F], gate and up side by side.      weight: [D, F].

    Returns:
        y [..., D], in gate_up's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    width = gate_up.shape[-1] // 2
    check("swiglu_linear", "weight", weight, (weight.shape[0], width), gate_up)
    if capability(gate_up) in CHECKED and gate_up.dtype != torch.float64:
        return triton_swiglu_linear(gate_up, weight)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight)


class SwiGLULinear(torch.autograd.Function):
    """gate_up [R, 2F] and weight [D, F] of one dtype to [R, D]."""

    @staticmethod
    def forward(ctx: Any, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        return swiglu(gate_up) @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy):
        gate_up, weight = ctx.saved_tensors
        dgate_up, y = swiglu_backward(gate_up, (dy @ weight).contiguous())
        return dgate_up, dy.t() @ y
