"""Segments of the delta rules joined on one GPU: states folded through dense transitions."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import step
from fla_dist.kernels.state import LOCAL, Dense, Pending, Scan, fold

LARGEST_KEY = 128
"""K up to which a transition fits in a program; beyond, each product is a launch of its own."""


@triton.jit
def dense_fold_kernel(
    transition, state, initial, entries, final,
    S, H, K, V,
    BK: tl.constexpr, BV: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Entering states of S stretches, one after the other.

    Grid: (blocks of V, B·H). One program owns [BK >= K, BV] of the state and walks all stretches.
    Reads a transition once a block, and each stretch's state once. Products in three parts of
    TF32, nearly fp32.
    """
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    o_k, o_v = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    mask = (o_k < K)[:, None] & (o_v < V)[None, :]
    mask_square = (o_k < K)[:, None] & (o_k < K)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    if REVERSE:
        o_square = o_k[:, None] + o_k[None, :] * K
    else:
        o_square = o_k[:, None] * K + o_k[None, :]
    b_state = tl.zeros([BK, BV], dtype=tl.float32)
    whole = tl.program_id(1).to(tl.int64) * K * V + o_state
    if HAS_INITIAL:
        b_state += tl.load(initial + whole, mask=mask, other=0.0)
    for i in range(S):
        stretch = (batch.to(tl.int64) * S + (S - 1 - i if REVERSE else i)) * H + head
        b_square = tl.load(transition + stretch * K * K + o_square, mask=mask_square, other=0.0)
        b_added = tl.load(state + stretch * K * V + o_state, mask=mask, other=0.0)
        tl.store(entries + stretch * K * V + o_state, b_state, mask=mask)
        b_state = tl.dot(b_square, b_state, b_added, input_precision="tf32x3")
    tl.store(final + whole, b_state, mask=mask)


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
    dense_fold_kernel[(triton.cdiv(value_size, block), batch * heads)](
        transition, state, initial, entries, final, count, heads, key_size, value_size,
        BK=max(16, triton.next_power_of_2(key_size)), BV=block, HAS_INITIAL=initial is not None,
        REVERSE=reverse, num_warps=4, num_stages=1,
    )  # fmt: skip
    return entries, final


@dense_fold.register_fake
def _(transition, state, initial, reverse):
    return torch.empty_like(state), torch.empty_like(state[:, 0])


class _DensePending:
    """A scan over the segments of one process: one launch, in `wait`."""

    def __init__(
        self, transition: Dense, state: Tensor, initial: Tensor | None, reverse: bool
    ) -> None:
        self.transition = transition
        self._arguments: Any = (state, initial, reverse)

    def wait(self) -> tuple[Tensor, Tensor]:
        state, initial, reverse = self._arguments
        self._arguments = None
        initial = None if initial is None else initial.contiguous()
        return dense_fold(self.transition.matrix, state, initial, reverse)


class _DenseScan:
    """`LOCAL` with its fold as one kernel."""

    def start(
        self,
        transition: Any,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> _DensePending:
        return _DensePending(transition, state, initial, reverse_of is not None)


_DENSE = _DenseScan()


def on_gpu(scan: Scan) -> Scan:
    """The scan to use for dense transitions on the GPU."""
    return _DENSE if scan is LOCAL else scan
