"""Packed sequences for tests: where documents start, told as the data pipeline tells it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_dist.parallel.slices import slice_lengths

LENGTH = 48
STARTS = {
    "one document": [0],
    "many documents": [0, 3, 4, 17, 29, 30, 31, 41],
    "start on a rank's edge": [0, 12, 24],
    "document over three ranks": [0, 7, 45],
    "document open before the sequence": [30],
}
"""First tokens of the documents in a sequence of LENGTH tokens; on 4 ranks a slice has 12."""


@dataclass(frozen=True)
class PackedTokens:
    """The fields of fla_dist.data.batch.Batch, [B, T] each."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    doc_ids: Tensor
    slice_lengths: tuple[int, ...] | None = None

    def slice(self, rank: int, size: int) -> PackedTokens:
        """What rank `rank` of `size` sequence-parallel ranks gets."""
        lengths = slice_lengths(self.tokens.shape[1], size)
        tokens, labels, positions = (
            x.split(lengths, dim=1)[rank] for x in (self.tokens, self.labels, self.positions)
        )
        return PackedTokens(tokens, labels, positions, doc_ids_of(positions), lengths)


def doc_ids_of(positions: Tensor) -> Tensor:
    return (positions == 0).cumsum(dim=1).to(torch.int32)


def positions_of(starts: list[int], length: int = LENGTH) -> Tensor:
    """[length] int32, the position of each token in its document.

    Where `starts` has no 0, the first token is the second of its document.
    """
    index = torch.arange(length)
    first = torch.zeros(length, dtype=torch.long)
    first[starts] = torch.tensor(starts)
    positions = index - first.cummax(dim=0).values
    positions[: min([*starts, length])] += 1
    return positions.to(torch.int32)


def packed_tokens(
    starts: list[list[int]], vocab_size: int, seed: int = 0, *, length: int = LENGTH
) -> PackedTokens:
    """The first `length` tokens of one sequence for each list of starts; the last token of each
    document has no label."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(starts), LENGTH)
    positions = torch.stack([positions_of(s) for s in starts])
    tokens = torch.randint(vocab_size, shape, generator=generator)
    labels = torch.randint(vocab_size, shape, generator=generator)
    labels[:, :-1] = labels[:, :-1].masked_fill(positions[:, 1:] == 0, -100)
    tokens, labels, positions = (x[:, :length] for x in (tokens, labels, positions))
    return PackedTokens(tokens, labels, positions, doc_ids_of(positions))
