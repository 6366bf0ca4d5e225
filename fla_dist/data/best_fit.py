"""Windowed best-fit packing: documents stay whole where they can.

A source's documents, in the order of its units, are taken a window of 512 sequences at a time. In a
window each document goes into the fullest sequence that still has room for it, longest documents
first; one longer than a sequence is cut, and its whole parts fill sequences of their own. What
remains free, less than a percent, is padding. The window's sequences come in the order of a keyed
permutation.

A window is a function of where it begins, so the cursor of a source is (unit number, document)
where its window begins and the number of the window's sequences that are delivered.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fla_dist.data.order import (
    Exhausted,
    Order,
    SourceOrder,
    SourceTooSmall,
    Span,
    make_key,
    permute,
)

WINDOW_SEQUENCES = 512


@dataclass(frozen=True)
class Window:
    """The sequences of a window, and the cursor where the next window begins.

    Attributes:
        pieces: [pieces, 3] (unit number, start, stop) of each piece of a document in its unit's
            stream, those of a sequence side by side.
        ends: [sequences] where each sequence's pieces end.
    """

    pieces: np.ndarray
    ends: np.ndarray
    next_cursor: tuple[int, int]


class BestFitOrder(Order):
    """The stream of global sequences; each of its spans is a document or a part of one.

    Args:
        sources, seed, count_tokens, epochs: as of Order.
        document_begins: (source, unit, key) → where each document begins in the unit's shuffled
            stream, and the stream's end; may wait for the unit to be built.
    """

    def __init__(
        self,
        sources: Sequence[SourceOrder],
        *,
        seed: int,
        count_tokens: Callable[[int, int], int],
        document_begins: Callable[[int, int, int], np.ndarray],
        epochs: int | None = None,
    ):
        super().__init__(sources, lanes=1, seed=seed, count_tokens=count_tokens, epochs=epochs)
        self._document_begins = document_begins
        self._delivered = [0] * len(sources)  # of each source's window
        self._windows: list[tuple[tuple[int, int, int], Window] | None] = [None] * len(sources)

    def next_sequence(self, length: int) -> list[Span]:
        """The pieces of documents that the next sequence of `length` tokens holds; moves on."""
        source = self._choose_source(length)
        window = self._window(source, length)
        while self._delivered[source] == len(window.ends):
            self._lanes[source][0] = list(window.next_cursor)
            self._dealt[source] = window.next_cursor[0] + 1
            self._delivered[source] = 0
            window = self._window(source, length)
        index = self._delivered[source]
        first, last = (int(window.ends[index - 1]) if index else 0), int(window.ends[index])
        spans = []
        for number, start, stop in window.pieces[first:last].tolist():
            unit, key = self._find_unit(source, number)
            spans.append(Span(source, unit, key, start, stop))
        self._delivered[source] += 1
        self.sequence += 1
        self._sequences[source] += 1
        self._tokens[source] += length
        return spans

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for source, delivered in zip(state["sources"], self._delivered, strict=True):
            source["delivered"] = delivered
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._delivered = [source["delivered"] for source in state["sources"]]

    def _window(self, source: int, length: int) -> Window:
        number, document = self._lanes[source][0]
        found = self._windows[source]
        if found is None or found[0] != (number, document, length):
            window = self._make_window(source, number, document, length)
            found = self._windows[source] = ((number, document, length), window)
        return found[1]

    def _make_window(self, source: int, number: int, document: int, length: int) -> Window:
        """Takes documents from a cursor on until they fill the window's sequences, and packs."""
        units, empty_units = self._num_units[source], 0
        missing = WINDOW_SEQUENCES * length
        numbers, starts, stops = [], [], []
        while missing > 0:
            if self._epochs is not None and number >= self._epochs * units:
                break
            unit, key = self._find_unit(source, number)
            begins = self._document_begins(source, unit, key)
            sizes = begins[document + 1 :] - begins[document]  # up to each document's end
            taken = min(int(np.searchsorted(sizes, missing)) + 1, len(sizes))
            empty_units = 0 if len(sizes) and sizes[-1] > 0 else empty_units + 1
            if empty_units > 2 * units:  # two epochs may put theirs end to end
                raise SourceTooSmall(source, 0)
            numbers.append(np.full(taken, number))
            starts.append(begins[document : document + taken])
            stops.append(begins[document + 1 : document + taken + 1])
            missing -= int(sizes[taken - 1]) if taken else 0
            document += taken
            if document >= len(begins) - 1:
                number, document = number + 1, 0
        documents = np.stack(
            [np.concatenate([np.empty(0, np.int64), *parts]) for parts in (numbers, starts, stops)],
            1,
        )
        documents = documents[documents[:, 2] > documents[:, 1]]
        if not len(documents):
            raise Exhausted
        pieces, ends = _pack(documents, length, make_key(self._seed, source, number, document))
        return Window(pieces, ends, (number, document))


def _pack(documents: np.ndarray, length: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces, ends) of a Window, of documents as of its pieces."""
    numbers, starts, stops = documents.T
    counts = -(-(stops - starts) // length)
    which = np.repeat(np.arange(len(documents)), counts)
    part = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[which] + part * length
    pieces = np.stack([numbers[which], begins, np.minimum(begins + length, stops[which])], 1)

    sizes = pieces[:, 2] - pieces[:, 1]
    longest_first = np.argsort(-sizes, kind="stable")
    sequence_of = np.empty(len(pieces), np.int64)
    free: list[tuple[int, int]] = []  # (room, sequence) of those not full, by room
    num_sequences = 0
    for piece, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        at = bisect.bisect_left(free, (size, -1))
        if at < len(free):
            room, sequence = free.pop(at)
        else:
            room, sequence = length, num_sequences
            num_sequences += 1
        sequence_of[piece] = sequence
        if room > size:
            bisect.insort(free, (room - size, sequence))
    places = permute(np.arange(num_sequences), num_sequences, key)
    place_of = places[sequence_of]
    order = np.argsort(place_of, kind="stable")
    ends = np.cumsum(np.bincount(place_of, minlength=num_sequences))
    return pieces[order], ends
