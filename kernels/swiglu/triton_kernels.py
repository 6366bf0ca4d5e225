"""SwiGLU's pointwise work in Triton: one pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel

BLOCK, WARPS = 1024, 4


@Kernel
@triton.jit
def swiglu_kernel(p_gate_up, p_y, F, BF: tl.constexpr):
    """y = silu(gate) up.  Grid: rows, blocks of F. 6 bytes a number in bf16: memory bounds it."""
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = o_f < F
    p_row = p_gate_up + row * 2 * F
    b_gate = tl.load(p_row + o_f, mask=inside).to(tl.float32)
    b_up = tl.load(p_row + F + o_f, mask=inside).to(tl.float32)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_y + row * F + o_f, b_y.to(p_y.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def swiglu_backward_kernel(p_gate_up, p_dy, p_dgate_up, p_y, F, BF: tl.constexpr):
    """The gradients of gate and up, and y again, which the output projection's gradient takes.
    Grid: rows, blocks of F. 12 bytes a number in bf16: memory bounds it."""
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = o_f < F
    p_row = p_gate_up + row * 2 * F
    b_gate = tl.load(p_row + o_f, mask=inside).to(tl.float32)
    b_up = tl.load(p_row + F + o_f, mask=inside).to(tl.float32)
    b_dy = tl.load(p_dy + row * F + o_f, mask=inside).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    dtype = p_y.dtype.element_ty
    tl.store(p_y + row * F + o_f, (b_silu * b_up).to(dtype), mask=inside)
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))
    p_drow = p_dgate_up + row * 2 * F
    tl.store(p_drow + o_f, b_dgate.to(dtype), mask=inside)
    tl.store(p_drow + F + o_f, (b_dy * b_silu).to(dtype), mask=inside)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, BLOCK)


@torch.library.custom_op("fla_dist::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) up [R, F] of gate_up [R, 2F], contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    swiglu_kernel[_grid(rows, width)](gate_up, y, width, BLOCK, num_warps=WARPS)
    return y


@swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("fla_dist::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up [R, 2F], and y [R, F], from that of y."""
    rows, width = dy.shape
    dgate_up, y = torch.empty_like(gate_up), torch.empty_like(dy)
    swiglu_backward_kernel[_grid(rows, width)](
        gate_up, dy, dgate_up, y, width, BLOCK, num_warps=WARPS
    )
    return dgate_up, y


@swiglu_backward.register_fake
def _(gate_up, dy):
    return torch.empty_like(gate_up), torch.empty_like(dy)
