"""Segments: how one process' slice is cut so that its stretches fill the GPU, and the fold of
diagonal states there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel, step

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def segment_length(
    batch: int, length: int, heads: int, chunk: int, programs: int, longest: int
) -> int:
    """Tokens of a segment: a multiple of the chunk, so that about `programs` of them run, one a
    head, at most `longest`."""
    wanted = -(-length * batch * heads // programs)
    chunks = max(1, -(-min(wanted, longest, length) // chunk))
    return chunk * chunks


def one_segment(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """The state [B, H, K, V], or zeros, as that of the only segment; k [B, T, ·, K], v
    [B, T, H, V]."""
    if state is not None:
        return state.float().contiguous()[:, None]
    batch, _, heads, value_size = v.shape
    return v.new_zeros(batch, 1, heads, k.shape[-1], value_size, dtype=torch.float32)


@triton.jit
def negligible(EXACT: tl.constexpr):
    """A chunk's decay below which a gradient through the chunk is less than the rounding of the
    two that it is the difference of."""
    return 5.9604645e-08 if EXACT else 0.00024414062


@triton.jit
def fold_step(b_state, b_added, b_decay, p_entry, mask):
    """Stores the state that enters a stretch, returns the one that leaves it."""
    tl.store(p_entry, b_state, mask=mask)
    return tl.where(mask, b_state * tl.exp2(b_decay * LOG2_E) + b_added, b_state)


@Kernel
@triton.jit
def fold_kernel(
    log_decay, state, initial, entries, final,
    S, H, K, V,
    decay_stride_b, decay_stride_s, decay_stride_h, decay_stride_k, decay_stride_v,
    HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entering states of S stretches, one after the other.

    Grid: (blocks of a [H, K, V] state, B). One program owns BLOCK elements of the state in
    registers and walks all stretches, four loaded at a time. Reads and writes each stretch's state
    once: bound by memory.
    """
    batch = tl.program_id(1).to(tl.int64)
    size = (H * K * V).to(tl.int64)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    log_decay += (
        (o // (K * V)) * decay_stride_h + (o // V % K) * decay_stride_k + (o % V) * decay_stride_v
        + batch * decay_stride_b
    )  # fmt: skip
    step = -1 if REVERSE else 1
    first = S - 1 if REVERSE else 0
    log_decay += first * decay_stride_s
    state += (batch * S + first) * size + o
    entries += (batch * S + first) * size + o
    decay_step, state_step = step * decay_stride_s, step * size
    b_state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_INITIAL:
        b_state += tl.load(initial + batch * size + o, mask=mask, other=0.0)
    for i in range(0, S, 4):
        mask_1, mask_2, mask_3 = mask & (i + 1 < S), mask & (i + 2 < S), mask & (i + 3 < S)
        b_added_0 = tl.load(state, mask=mask, other=0.0)
        b_added_1 = tl.load(state + state_step, mask=mask_1, other=0.0)
        b_added_2 = tl.load(state + 2 * state_step, mask=mask_2, other=0.0)
        b_added_3 = tl.load(state + 3 * state_step, mask=mask_3, other=0.0)
        b_decay_0 = tl.load(log_decay, mask=mask, other=0.0)
        b_decay_1 = tl.load(log_decay + decay_step, mask=mask_1, other=0.0)
        b_decay_2 = tl.load(log_decay + 2 * decay_step, mask=mask_2, other=0.0)
        b_decay_3 = tl.load(log_decay + 3 * decay_step, mask=mask_3, other=0.0)
        b_state = fold_step(b_state, b_added_0, b_decay_0, entries, mask)
        b_state = fold_step(b_state, b_added_1, b_decay_1, entries + state_step, mask_1)
        b_state = fold_step(b_state, b_added_2, b_decay_2, entries + 2 * state_step, mask_2)
        b_state = fold_step(b_state, b_added_3, b_decay_3, entries + 3 * state_step, mask_3)
        state += 4 * state_step
        entries += 4 * state_step
        log_decay += 4 * decay_step
    tl.store(final + batch * size + o, b_state, mask=mask)


@step("fla_dist::fold")
def fold_op(
    log_decay: Tensor, state: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """`fla_dist.kernels.state.fold` for states [B, S, H, K, V] on the GPU."""
    batch, count, heads, key_size, value_size = state.shape
    entries, final = torch.empty_like(state), torch.empty_like(state[:, 0])
    block = 512
    fold_kernel[(-(-(heads * key_size * value_size) // block), batch)](
        log_decay, state, initial, entries, final,
        count, heads, key_size, value_size, *log_decay.expand_as(state).stride(),
        HAS_INITIAL=initial is not None, REVERSE=reverse, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return entries, final


@fold_op.register_fake
def _(
    log_decay: Tensor, state: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state), torch.empty_like(state[:, 0])
