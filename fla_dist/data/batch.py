"""What the model is fed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """This rank's slice of a micro batch of packed sequences.

    Attributes:
        tokens: [B, T] int64.
        labels: [B, T] int64, the next token; -100 where there is none to predict. The last label of
            a slice is the next slice's first token.
        positions: [B, T] int32, of each token in its document within the sequence; a document cut
            by the sequence's border restarts at 0 in the next one. They continue over slices.
        doc_ids: [B, T] int32, cumsum(positions == 0) along this slice: 0 is the document already
            open before the slice's first token.
        slice_lengths: T of every sequence-parallel rank, in their order; None where all are equal.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    doc_ids: torch.Tensor
    slice_lengths: tuple[int, ...] | None = None

    @staticmethod
    def empty(rows: int, slice_lengths: tuple[int, ...], rank: int, *, pin_memory: bool) -> Batch:
        """Of sequence-parallel rank `rank`."""
        shape = (rows, slice_lengths[rank])
        return Batch(
            torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory),
            torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory),
            torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory),
            torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory),
            slice_lengths,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.positions.to(device, non_blocking=non_blocking),
            self.doc_ids.to(device, non_blocking=non_blocking),
            self.slice_lengths,
        )
