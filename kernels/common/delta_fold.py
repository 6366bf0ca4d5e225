"""The fold of states through dense transitions on one GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel, power_of_two, step
from fla_dist.kernels.state import Dense, fold

LARGEST_KEY = 128
"""K up to which a transition fits in a program; beyond, each product is a launch of its own."""


@triton.jit
def load_quadrant(transition, row, column, K, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """[HALF, HALF] of the matrix, or of its transpose."""
    o_row, o_column = row + tl.arange(0, HALF), column + tl.arange(0, HALF)
    mask = (o_row < K)[:, None] & (o_column < K)[None, :]
    if REVERSE:
        p_square = transition + o_row[:, None] + o_column[None, :] * K
    else:
        p_square = transition + o_row[:, None] * K + o_column[None, :]
    return tl.load(p_square, mask=mask, other=0.0)


@Kernel
@triton.jit
def dense_fold_kernel(
    transition, state, initial, entries, final,
    S, H, K, V,
    HALF: tl.constexpr, BV: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Entering states of S stretches, one after the other.

    Grid: (blocks of V, B·H). One program owns [2 HALF >= K, BV] of the state, as two halves, and
    walks all stretches. Reads a transition once a block, and each stretch's state once. Products in
    three parts of TF32, nearly fp32.
    """
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    o_first, o_v = tl.arange(0, HALF), tl.program_id(0) * BV + tl.arange(0, BV)
    o_second = HALF + o_first
    mask_first = (o_first < K)[:, None] & (o_v < V)[None, :]
    mask_second = (o_second < K)[:, None] & (o_v < V)[None, :]
    o_first, o_second = (
        o_first[:, None] * V + o_v[None, :],
        o_second[:, None] * V + o_v[None, :],
    )
    b_first = tl.zeros([HALF, BV], dtype=tl.float32)
    b_second = tl.zeros([HALF, BV], dtype=tl.float32)
    whole = tl.program_id(1).to(tl.int64) * K * V
    if HAS_INITIAL:
        b_first += tl.load(initial + whole + o_first, mask=mask_first, other=0.0)
        b_second += tl.load(initial + whole + o_second, mask=mask_second, other=0.0)
    for i in range(S):
        stretch = (batch.to(tl.int64) * S + (S - 1 - i if REVERSE else i)) * H + head
        square, added = transition + stretch * K * K, state + stretch * K * V
        entry = entries + stretch * K * V
        tl.store(entry + o_first, b_first, mask=mask_first)
        tl.store(entry + o_second, b_second, mask=mask_second)
        b_next = tl.load(added + o_first, mask=mask_first, other=0.0)
        b_last = tl.load(added + o_second, mask=mask_second, other=0.0)
        for half in tl.range(0, 2, num_stages=1):
            b_half = tl.where(half == 0, b_first, b_second)
            b_square = load_quadrant(square, 0, half * HALF, K, HALF, REVERSE)
            b_next = tl.dot(b_square, b_half, b_next, input_precision="tf32x3")
            b_square = load_quadrant(square, HALF, half * HALF, K, HALF, REVERSE)
            b_last = tl.dot(b_square, b_half, b_last, input_precision="tf32x3")
        b_first, b_second = b_next, b_last
    tl.store(final + whole + o_first, b_first, mask=mask_first)
    tl.store(final + whole + o_second, b_second, mask=mask_second)


@step("fla_dist::dense_fold")
def dense_fold(
    transition: Tensor, state: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """`fla_dist.kernels.state.fold` for states [B, S, H, K, V] and transitions [B, S, H, K, K] on
    the GPU."""
    batch, count, heads, key_size, value_size = state.shape
    if key_size > LARGEST_KEY:
        entering = torch.zeros_like(state[:, 0]) if initial is None else initial
        return fold(Dense(transition), state, entering, reverse=reverse)
    entries, final = torch.empty_like(state), torch.empty_like(state[:, 0])
    block = 16
    dense_fold_kernel[(-(-value_size // block), batch * heads)](
        transition, state, initial, entries, final, count, heads, key_size, value_size,
        HALF=max(16, power_of_two(key_size) // 2), BV=block,
        HAS_INITIAL=initial is not None, REVERSE=reverse, num_warps=4, num_stages=1,
    )  # fmt: skip
    return entries, final


@dense_fold.register_fake
def _(transition, state, initial, reverse):
    return torch.empty_like(state), torch.empty_like(state[:, 0])
