"""Which keys each query sees, worked out once a batch and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys a block of FlexAttention's mask."""


@dataclass(frozen=True)
class AttentionMask:
    """Query t sees the keys from first_t to its own, in the numbering of the slice's tokens.

    Attributes:
        first: [B, T] int32; negative in the left context.
        context: keys before the slice.
        window: tokens that a query sees at most, itself included; None for all.
        causal: every query sees all keys before it; known where no window hides one.
        blocks: the same for FlexAttention; None where it does not serve.
    """

    first: Tensor
    context: int
    window: int | None
    causal: bool
    blocks: BlockMask | None


def attention_mask(positions: Tensor, *, context: int = 0, window: int | None) -> AttentionMask:
    """The mask of a slice; on a GPU it waits for `positions` where no window hides a key.

    Args:
        positions: [B, T] integer, each token's position in its document.
        context: keys before the slice.
        window: tokens that a query sees, itself included; None for all.
    """
    if window is not None and window < 1:
        raise ValueError(f"attention_mask: window is {window}, expected at least 1")
    length = positions.shape[1]
    reach = positions if window is None else positions.clamp(max=window - 1)
    index = torch.arange(length, device=positions.device, dtype=torch.int32)
    first = (index - reach).clamp(min=-context).to(torch.int32)
    whole = window is None or window >= context + length
    causal = whole and bool((first == -context).all())
    by_blocks = positions.is_cuda and length >= BLOCK and not causal
    blocks = block_mask(first, context) if by_blocks else None
    return AttentionMask(first, context, window, causal, blocks)


def block_mask(first: Tensor, context: int) -> BlockMask:
    """FlexAttention's mask from the first key that each query sees, [B, T], without a score a pair
    of tokens: the blocks that some query of a block sees, and those that all see in whole."""
    length = first.shape[1]
    keys = context + length
    first = first + context  # in the numbering of the keys
    padding = (0, -length % BLOCK)
    lowest = F.pad(first, padding, value=keys).unflatten(1, (-1, BLOCK)).amin(dim=2)
    highest = F.pad(first, padding, value=0).unflatten(1, (-1, BLOCK)).amax(dim=2)
    query = torch.arange(0, length, BLOCK, device=first.device)[:, None] + context  # [Q, 1]
    last_query = (query + BLOCK - 1).clamp(max=keys - 1)
    key = torch.arange(0, keys, BLOCK, device=first.device)  # [K]
    seen = (key <= last_query) & (key + BLOCK > lowest[:, :, None])  # [B, Q, K]
    whole = (key + BLOCK - 1 <= query) & (key >= highest[:, :, None])

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= first[batch, q]) & (k <= q + context)

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, keys),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Q, K] bool as counts [B, 1, Q] and indices [B, 1, Q, K], those set first."""
    indices = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    counts = blocks.sum(dim=2, dtype=torch.int32)
    return counts[:, None].contiguous(), indices[:, None].to(torch.int32).contiguous()
