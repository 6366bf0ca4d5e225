"""A sequence's tokens, labels, positions and document ids from the shards that hold them.

Only a slice's tokens are read. Where documents start in the rest of the sequence is known from the
shards' indices, so a slice's positions need neither the other tokens nor the other ranks.

Notation: T tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fla_dist.data.batch import IGNORED_LABEL
from fla_dist.data.order import Span, permute
from fla_dist.data.shard import Shard


@dataclass(frozen=True)
class ShuffledShard:
    """A shard's documents in the order of a keyed permutation: one stream of tokens.

    Attributes:
        starts: [documents] where document i of the order starts in the shard.
        begins: [documents + 1] where it begins in the stream, and the stream's end.
    """

    shard: Shard
    starts: np.ndarray
    begins: np.ndarray

    @staticmethod
    def make(shard: Shard, key: int) -> ShuffledShard:
        count = shard.header.documents
        order = permute(np.arange(count), count, key)
        starts = shard.begins[:-1][order]
        lengths = np.diff(shard.begins)[order]
        return ShuffledShard(shard, starts, np.concatenate([[0], np.cumsum(lengths)]))

    def document_begins(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin in stream range [start, stop)."""
        first, last = np.searchsorted(self.begins[:-1], (start, stop))
        return self.begins[first:last]

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copies tokens [start, stop) of the stream."""
        first = int(np.searchsorted(self.begins, start, "right")) - 1
        last = int(np.searchsorted(self.begins, stop, "left"))
        begins = np.maximum(self.begins[first:last], start)
        sources = (self.starts[first:last] + begins - self.begins[first:last]).tolist()
        bounds = [*(begins - start).tolist(), stop - start]
        for i, source in enumerate(sources):
            begin, end = bounds[i], bounds[i + 1]
            out[begin:end] = self.shard.read(source, source + end - begin)


@dataclass(frozen=True)
class PackedSlice:
    """One row of a Batch, as numpy arrays [T]."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    doc_ids: np.ndarray


def pack_slice(
    spans: Sequence[Span],
    shards: Sequence[ShuffledShard],
    *,
    start: int,
    stop: int,
    packing: str,
    mask_document_ends: bool,
) -> PackedSlice:
    """Slice [start, stop) of the sequence that `spans` hold with one token more.

    Args:
        shards: each span's.
        packing: "documents" restarts positions with each document; "none" counts through.
        mask_document_ends: no label where the next token is another document's first.
    """
    length = stop - start
    stream = np.empty(length + 1, np.int64)
    document_starts = []  # in the sequence, up to the token after the slice
    at = 0
    for span, shard in zip(spans, shards, strict=True):
        end = at + span.stop - span.start
        shift = at - span.start
        begins = shard.document_begins(span.start, min(span.stop, stop + 1 - shift))
        document_starts.append(begins + shift)
        first, last = max(at, start), min(end, stop + 1)
        if first < last:
            shard.read(first - shift, last - shift, stream[first - start : last - start])
        at = end
        if at > stop:
            break
    starts = np.concatenate(document_starts)
    labels = stream[1:].copy()
    if mask_document_ends:
        ends = starts[starts > start] - 1 - start
        labels[ends] = IGNORED_LABEL
    positions, doc_ids = _positions(starts if packing == "documents" else starts[:0], start, stop)
    return PackedSlice(stream[:-1], labels, positions, doc_ids)


def padding(start: int, stop: int) -> PackedSlice:
    """A sequence without a label, that fills up the last micro batch of a validation."""
    positions, doc_ids = _positions(np.empty(0, np.int64), start, stop)
    tokens = np.zeros(stop - start, np.int64)
    return PackedSlice(tokens, np.full_like(tokens, IGNORED_LABEL), positions, doc_ids)


def _positions(starts: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, doc_ids) of slice [start, stop) of a sequence with documents at `starts`.

    A document that the sequence's border cut starts at 0 like any other.
    """
    open_since = int(starts[starts <= start].max(initial=0))
    inside = starts[(starts > start) & (starts < stop)]
    begins = np.concatenate([[open_since], inside])
    lengths = np.diff(np.concatenate([[start], inside, [stop]]))
    positions = np.arange(start, stop, dtype=np.int32) - np.repeat(begins, lengths).astype(np.int32)
    first_id = 1 if open_since == start else 0
    doc_ids = np.repeat(np.arange(first_id, first_id + len(lengths), dtype=np.int32), lengths)
    return positions, doc_ids
