"""A sequence's tokens, labels, positions and document ids, from the shards into a batch's row.

Only a slice's tokens are read. Where documents start in the rest of the sequence is known from the
shards' indices, so a slice's positions need neither the other tokens nor the other ranks.

Notation: T tokens of a slice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fla_dist.data.batch import IGNORED_LABEL
from fla_dist.data.order import Span, permute
from fla_dist.data.shard import Shard

PADDING_TOKEN = 0


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

    def document_end(self, position: int) -> int:
        """Where the document that holds a stream's token ends."""
        return int(self.begins[np.searchsorted(self.begins, position, "right")])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copies tokens [start, stop) of the stream."""
        first = int(np.searchsorted(self.begins, start, "right")) - 1
        last = int(np.searchsorted(self.begins, stop, "left"))
        bounds = self.begins[first : last + 1].copy()
        bounds[0], bounds[-1] = start, stop
        sources = self.starts[first:last].copy()
        sources[0] += start - self.begins[first]
        begins = (bounds - start).tolist()
        self.shard.check(sources, sources + (bounds[1:] - bounds[:-1]))
        tokens = self.shard.tokens
        for i, source in enumerate(sources.tolist()):
            begin, end = begins[i], begins[i + 1]
            out[begin:end] = tokens[source : source + end - begin]


@dataclass(frozen=True)
class Row:
    """One row of a Batch, as numpy arrays [T] to be written."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    doc_ids: np.ndarray

    @staticmethod
    def empty(length: int) -> Row:
        wide, narrow = np.empty((2, length), np.int64), np.empty((2, length), np.int32)
        return Row(wide[0], wide[1], narrow[0], narrow[1])


def pack_stream(
    spans: Sequence[Span],
    shards: Sequence[ShuffledShard],
    row: Row,
    *,
    start: int,
    restart_positions: bool,
    mask_document_ends: bool,
) -> None:
    """Writes the slice from `start` on of the sequence that `spans` hold with one token more.

    Args:
        shards: each span's.
        restart_positions: at each document; else they count through the sequence.
        mask_document_ends: no label where the next token is another document's first.
    """
    length = len(row.tokens)
    stop = start + length
    stream = np.empty(length + 1, shards[0].shard.header.dtype)
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
    starts = np.concatenate(document_starts) if len(document_starts) > 1 else document_starts[0]
    row.tokens[:] = stream[:-1]
    row.labels[:] = stream[1:]
    if mask_document_ends:
        row.labels[starts[np.searchsorted(starts, start, "right") :] - 1 - start] = IGNORED_LABEL
    _write_positions(starts if restart_positions else starts[:0], start, row)


def pack_documents(
    spans: Sequence[Span], shards: Sequence[ShuffledShard], row: Row, *, start: int
) -> None:
    """Writes the slice from `start` on of a sequence of `spans`, each a document or a part of one.

    Labels are those of the document; behind the last span is padding, without labels.
    """
    stop = start + len(row.tokens)
    row.tokens[:] = PADDING_TOKEN
    row.labels[:] = IGNORED_LABEL
    at = 0
    starts = []
    for span, shard in zip(spans, shards, strict=True):
        starts.append(at)
        end = at + span.stop - span.start
        first, last = max(at, start), min(end, stop)
        if first < last:
            begin, shift = first - start, span.start - at
            labelled = min(last + 1 + shift, shard.document_end(span.start)) - (first + shift)
            stream = np.empty(max(last - first, labelled), shard.shard.header.dtype)
            shard.read(first + shift, first + shift + len(stream), stream)
            row.tokens[begin : begin + last - first] = stream[: last - first]
            row.labels[begin : begin + labelled - 1] = stream[1:labelled]
        at = end
    _write_positions(np.array([*starts, at], np.int64), start, row)


def pack_padding(row: Row, start: int) -> None:
    """Writes a sequence without a label, that fills up the last micro batch of a validation."""
    row.tokens[:] = PADDING_TOKEN
    row.labels[:] = IGNORED_LABEL
    _write_positions(np.empty(0, np.int64), start, row)


def _write_positions(starts: np.ndarray, start: int, row: Row) -> None:
    """Positions and document ids of the slice from `start` on of a sequence with documents at
    `starts`.

    A document that the sequence's border cut starts at 0 like any other.
    """
    length = len(row.positions)
    first = int(np.searchsorted(starts, start, "right"))
    last = int(np.searchsorted(starts, start + length, "left"))
    open_since = int(starts[first - 1]) if first else 0
    bounds = np.empty(last - first + 2, np.int64)
    bounds[0], bounds[-1] = 0, length
    bounds[1:-1] = starts[first:last] - start
    lengths = bounds[1:] - bounds[:-1]
    begins = bounds[:-1].astype(np.int32)
    begins[0] = open_since - start
    np.subtract(_counts(length), np.repeat(begins, lengths), out=row.positions)
    first_id = 1 if open_since == start else 0
    ids = np.arange(first_id, first_id + len(lengths), dtype=np.int32)
    row.doc_ids[:] = np.repeat(ids, lengths)


@functools.lru_cache(maxsize=2)
def _counts(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)
