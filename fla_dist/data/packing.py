"""A sequence's tokens, labels, positions and document ids, from the shards into a batch's row.

Only a slice's tokens are read. Where documents start in the rest of the sequence is known from the
shards' indices, so a slice's positions need neither the other tokens nor the other ranks.

Notation: T tokens of a slice.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fla_dist.data.batch import IGNORED_LABEL
from fla_dist.data.order import Span, permute
from fla_dist.data.shard import Shard

PADDING_TOKEN = 0


class ShuffledShard:
    """A shard's documents in the order of a keyed permutation: one stream of tokens.

    Attributes:
        shard: where they are read.
        begins: [documents + 1] where each document begins in the stream, and the stream's end;
            documents without tokens are left out.
    """

    def __init__(self, shard: Shard, key: int):
        count = shard.header.documents
        order = permute(np.arange(count), count, key)
        lengths = np.diff(shard.begins)[order]
        order, lengths = order[lengths > 0], lengths[lengths > 0]
        self.shard = shard
        self.begins = np.zeros(len(order) + 1, np.int64)
        np.cumsum(lengths, out=self.begins[1:])
        # Several times faster than the arrays to bisect, and to take a few integers of.
        self._begins = self.begins.data
        self._places = shard.begins[order].data  # where each begins in the shard

    def document_end(self, position: int) -> int:
        """Where the document that holds a stream's token ends."""
        return self._begins[bisect_right(self._begins, position)]

    def read(self, start: int, stop: int, out: np.ndarray) -> list[int]:
        """Copies tokens [start, stop) of the stream.

        Returns:
            Where the document of token `start` begins, and where others do before `stop`.
        """
        first = bisect_right(self._begins, start) - 1
        last = bisect_left(self._begins, stop)
        begins = self._begins[first:last].tolist()
        places = self._places[first:last].tolist()
        places[0] += start - begins[0]
        bounds = [0, *[begin - start for begin in begins[1:]], stop - start]
        self.shard.read(places, bounds, out)
        return begins


class Row(NamedTuple):
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
    starts: list[int] = []  # of documents in the slice or right behind it, after the one open at 0
    open_since = 0
    at = 0
    for span, shard in zip(spans, shards, strict=True):
        end = at + span.stop - span.start
        first, last = max(at, start), min(end, stop + 1)
        if first < last:
            shift = at - span.start
            begins = shard.read(first - shift, last - shift, stream[first - start : last - start])
            shift -= start
            if first == start:
                open_since = max(begins.pop(0) + shift, -start)
            starts += [begin + shift for begin in begins]
        at = end
        if at > stop:
            break
    row.tokens[:] = stream[:-1]
    row.labels[:] = stream[1:]
    if mask_document_ends:
        for begin in starts:
            row.labels[begin - 1] = IGNORED_LABEL
    if restart_positions:
        _write_positions(open_since, starts, row)
    else:
        _write_positions(-start, [], row)


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
        if at >= stop:
            break
    else:
        starts.append(at)
    relative = [begin - start for begin in starts]
    others = bisect_right(relative, 0)
    _write_positions(relative[others - 1], relative[others:], row)


def pack_padding(row: Row, start: int) -> None:
    """Writes a sequence without a label, that fills up the last micro batch of a validation."""
    row.tokens[:] = PADDING_TOKEN
    row.labels[:] = IGNORED_LABEL
    _write_positions(-start, [], row)


def _write_positions(open_since: int, starts: list[int], row: Row) -> None:
    """Positions and document ids of a slice.

    Args:
        open_since: at most 0, where the document of its first token starts; one that the sequence's
            border cut starts at the border.
        starts: where others start, above 0 and at most the slice's length.
    """
    length = len(row.positions)
    bounds = np.array([0, *starts, length])
    lengths = bounds[1:] - bounds[:-1]
    begins = np.array([open_since, *starts], np.int32)
    np.subtract(_counts(length), begins.repeat(lengths), out=row.positions)
    first_id = 1 if open_since == 0 else 0
    row.doc_ids[:] = np.arange(first_id, first_id + len(begins), dtype=np.int32).repeat(lengths)


@functools.lru_cache(maxsize=2)
def _counts(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)
