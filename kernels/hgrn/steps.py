"""HGRN's launches as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fla_dist.kernels.common.launch import step
from fla_dist.kernels.hgrn.triton_kernels import backward_kernel, forward_kernel
from fla_dist.kernels.state import RESET


@dataclass(frozen=True)
class Settings:
    """rows: of a segment, a warp each.  row: its tokens.  forward_unroll, backward_unroll: tokens
    of a row whose loads are in flight together.  group: segments.  block: channels of a program."""

    rows: int
    row: int
    forward_unroll: int
    backward_unroll: int
    group: int = 16
    block: int = 128


def settings(x: Tensor, g: Tensor, packed: bool) -> Settings:
    """Longer rows are a fifth faster; what else was checked on a GPU was so with shorter ones."""
    if x.dtype == g.dtype == torch.bfloat16 and not packed:
        return Settings(4, 32, 16, 8)
    return Settings(8, 16, 4, 4)


def _launch(
    x: Tensor, chosen: Settings, unroll: int
) -> tuple[tuple[int, int, int], list[Tensor], dict[str, Any]]:
    """The grid, the maps, carried states and arrivals, and the kernel's constants."""
    batch, length, channels = x.shape
    segment, block = chosen.rows * chosen.row, min(chosen.block, triton.next_power_of_2(channels))
    blocks, count = triton.cdiv(channels, block), triton.cdiv(length, segment)
    groups = triton.cdiv(count, chosen.group)
    joining = [
        x.new_empty(batch, count, 2, channels, dtype=torch.float32),
        x.new_empty(batch, groups, channels, dtype=torch.float32),
        x.new_zeros(batch, groups, blocks, dtype=torch.int32),
    ]
    even = length % segment == 0 and channels % block == 0
    constants = dict(
        D=channels, RESET=RESET, R=chosen.rows, L=chosen.row, U=unroll, BD=block,
        GROUP=chosen.group, EVEN=even, num_warps=chosen.rows,
    )  # fmt: skip
    return (blocks, count, batch), joining, constants


@step("fla_dist::hgrn_forward")
def forward(
    x: Tensor, g: Tensor, starts: Tensor | None, initial: Tensor | None, write: bool
) -> tuple[Tensor, Tensor]:
    """The output [B, T, D] (empty unless `write`) and the final state [B, D]."""
    batch, length, channels = x.shape
    h = x.new_empty(x.shape if write else (0,))
    final = x.new_empty(batch, channels, dtype=torch.float32)
    chosen = settings(x, g, starts is not None)
    grid, joining, constants = _launch(x, chosen, chosen.forward_unroll)
    forward_kernel[grid](
        x, g, x if starts is None else starts, x if initial is None else initial, h, final,
        *joining, length, x.stride(0), g.stride(0),
        x_stride_t=x.stride(1), g_stride_t=g.stride(1),
        HAS_INITIAL=initial is not None, PACKED=starts is not None, WRITE=write, **constants,
    )  # fmt: skip
    return h, final


@forward.register_fake
def _(x, g, starts, initial, write):
    final = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape if write else (0,)), final


@step("fla_dist::hgrn_backward")
def backward(
    x: Tensor, g: Tensor, h: Tensor, dh: Tensor, starts: Tensor | None, initial: Tensor | None,
    final_gradient: Tensor | None, write: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and g (empty unless `write`) and of the initial state [B, D]."""
    batch, length, channels = x.shape
    shape = x.shape if write else (0,)
    dx, dg = x.new_empty(shape), g.new_empty(shape)
    initial_gradient = x.new_empty(batch, channels, dtype=torch.float32)
    chosen = settings(x, g, starts is not None)
    grid, joining, constants = _launch(x, chosen, chosen.backward_unroll)
    backward_kernel[grid](
        x, g, h, dh, x if starts is None else starts, x if initial is None else initial,
        x if final_gradient is None else final_gradient, dx, dg, initial_gradient,
        *joining, length, x.stride(0), g.stride(0), dh.stride(0),
        x_stride_t=x.stride(1), g_stride_t=g.stride(1), dh_stride_t=dh.stride(1),
        HAS_INITIAL=initial is not None, HAS_FINAL=final_gradient is not None,
        PACKED=starts is not None, WRITE=write, **constants,
    )  # fmt: skip
    return dx, dg, initial_gradient


@backward.register_fake
def _(x, g, h, dh, starts, initial, final_gradient, write):
    shape = x.shape if write else (0,)
    state = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    return x.new_empty(shape), g.new_empty(shape), state
