"""HGRN's launches as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.launch import floats, power_of_two, step
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


LONG, SHORT = Settings(4, 32, 16, 8), Settings(8, 16, 4, 4)


def settings(x: Tensor, g: Tensor, packed: bool) -> Settings:
    """Longer rows are a fifth faster; what else was checked on a GPU was so with shorter ones."""
    return LONG if x.dtype == g.dtype == torch.bfloat16 and not packed else SHORT


@lru_cache
def _launch(
    chosen: Settings, unroll: int, batch: int, length: int, channels: int
) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """The grid, the groups, and the kernel's constants."""
    segment, block = chosen.rows * chosen.row, min(chosen.block, power_of_two(channels))
    blocks, count = -(-channels // block), -(-length // segment)
    even = length % segment == 0 and channels % block == 0
    constants = dict(
        D=channels, RESET=RESET, R=chosen.rows, L=chosen.row, U=unroll, BD=block,
        GROUP=chosen.group, EVEN=even, num_warps=chosen.rows,
    )  # fmt: skip
    return (blocks, count, batch), -(-count // chosen.group), constants


def _joining(x: Tensor, grid: tuple[int, int, int], groups: int) -> tuple[Tensor, Tensor]:
    """Room for the maps of the segments and the states that groups carry, and for arrivals."""
    blocks, count, batch = grid
    return (
        floats(x, batch, 2 * count + groups, x.shape[2]),
        x.new_zeros((batch, groups, blocks), dtype=torch.int32),
    )


@step("fla_dist::hgrn_forward")
def forward(
    x: Tensor, g: Tensor, starts: Tensor | None, initial: Tensor | None, write: bool
) -> tuple[Tensor, Tensor]:
    """The output [B, T, D] (empty unless `write`) and the final state [B, D]."""
    batch, length, channels = x.shape
    h = x.new_empty(x.shape if write else (0,))
    final = floats(x, batch, channels)
    chosen = settings(x, g, starts is not None)
    grid, groups, constants = _launch(chosen, chosen.forward_unroll, batch, length, channels)
    forward_kernel[grid](
        x, g, x if starts is None else starts, x if initial is None else initial, h, final,
        *_joining(x, grid, groups), length, x.stride(0), g.stride(0),
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
    initial_gradient = floats(x, batch, channels)
    chosen = settings(x, g, starts is not None)
    grid, groups, constants = _launch(chosen, chosen.backward_unroll, batch, length, channels)
    backward_kernel[grid](
        x, g, h, dh, x if starts is None else starts, x if initial is None else initial,
        x if final_gradient is None else final_gradient, dx, dg, initial_gradient,
        *_joining(x, grid, groups), length, x.stride(0), g.stride(0), dh.stride(0),
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
