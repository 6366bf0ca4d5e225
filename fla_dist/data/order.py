"""Which tokens form global sequence n: a function of the seed and the plan, never of the ranks.

Each source's units are ordered by a keyed permutation of (seed, epoch), one epoch after another
without end. Its lanes start on the first units; a lane that has used up its unit is dealt the next
one, so no unit of an epoch starts before all those of the epoch before. Inside a unit the documents
lie in the order of another keyed permutation; that shuffled unit is one stream of tokens, and a
lane's cursor is (unit number, token offset).

Sequence n belongs to the source that is furthest behind its weight in tokens, and a source's k-th
sequence comes from its lane k mod lanes. With one source this is lane n mod lanes.

Only the sizes of units that a cursor has reached are needed, so an order can run while its units
are still being built. It takes constant memory, whatever the number of units.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MAX_64 = (1 << 64) - 1
ROUNDS = 5
UNITS_AT_ONCE = 1024


def make_key(*parts: int | str) -> int:
    """A 64-bit key from what it depends on."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of `index` under permutation `key` of range(size).

    A balanced Feistel network permutes the smallest range 4^b >= size; images outside of
    range(size) walk along their cycle until they are inside it (fewer than four steps on average).

    Args:
        index: [N] int64, each in range(size).

    Returns:
        [N] int64.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    image = _feistel(index.astype(np.uint64), half, key)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _feistel(image[outside], half, key)
        outside = outside[image[outside] >= size]
    return image.astype(np.int64)


def _feistel(value: np.ndarray, half: int, key: int) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for round_index in range(ROUNDS):
        round_key = np.uint64((key + (round_index + 1) * 0x9E3779B97F4A7C15) & MAX_64)
        mixed = right + round_key  # splitmix64's finalizer; uint64 wraps
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right


class Span(NamedTuple):
    """Tokens [start, stop) of a unit's documents, shuffled by `key`."""

    source: int
    unit: int
    key: int
    start: int
    stop: int


@dataclass(frozen=True)
class SourceOrder:
    """What the order must know of a source.

    Attributes:
        num_units: at least one.
        weight: its share of the tokens, relative to the other sources'.
    """

    num_units: int
    weight: float


class Exhausted(Exception):
    """An order of a limited number of epochs has no whole sequence left."""


class SourceTooSmall(Exception):
    """Source number `source` has `tokens` tokens, fewer than one sequence and its last label."""

    def __init__(self, source: int, tokens: int):
        super().__init__(source, tokens)
        self.source = source
        self.tokens = tokens


class Order:
    """The stream of global sequences.

    Args:
        sources: what is blended.
        lanes: streams a source's units are dealt to; a source of fewer units has that many lanes.
        seed: of every permutation.
        count_tokens: (source, unit) → the unit's tokens; may wait for the unit to be built.
        epochs: after this many of any source the order ends; None: never.
    """

    def __init__(
        self,
        sources: Sequence[SourceOrder],
        *,
        lanes: int,
        seed: int,
        count_tokens: Callable[[int, int], int],
        epochs: int | None = None,
    ):
        total = sum(source.weight for source in sources)
        self.sequence = 0
        self._weights = [source.weight / total for source in sources]
        self._num_units = [source.num_units for source in sources]
        self._seed = seed
        self._epochs = epochs
        self._count_tokens = count_tokens
        self._tokens = [0] * len(sources)  # delivered, by source
        self._sequences = [0] * len(sources)
        self._lanes = [[[n, 0] for n in range(min(lanes, s.num_units))] for s in sources]
        self._dealt = [len(cursors) for cursors in self._lanes]
        self._large_enough: set[tuple[int, int]] = set()
        self._find_unit = functools.lru_cache(maxsize=4096)(self._compute_unit)

    def next_sequence(self, length: int) -> list[Span]:
        """The spans of the next sequence's `length` tokens and the one after them; moves on.

        The one after is the last token's label; it is also the lane's next sequence's first token.
        """
        source = self._choose_source(length)
        cursors = self._lanes[source]
        cursor = cursors[self._sequences[source] % len(cursors)]
        spans: list[Span] = []
        missing = length
        while True:
            number, offset = cursor
            unit, key = self._find_unit(source, number)
            size = self._count_tokens(source, unit)
            if offset >= size:
                self._deal(source, cursor, length)
                continue
            taken = min(missing, size - offset)
            cursor[1] += taken
            missing -= taken
            if missing == 0 and cursor[1] < size:
                spans.append(Span(source, unit, key, offset, cursor[1] + 1))
                break
            spans.append(Span(source, unit, key, offset, cursor[1]))
        self.sequence += 1
        self._sequences[source] += 1
        self._tokens[source] += length
        return spans

    def upcoming_units(self, source: int) -> Iterator[int]:
        """Every unit of a source once, those that this epoch still needs in their order first."""
        size, dealt = self._num_units[source], self._dealt[source]
        held = dict.fromkeys(
            self._find_unit(source, number)[0] for number, _ in sorted(self._lanes[source])
        )
        epoch, done = divmod(dealt, size)
        key = self._epoch_key(source, epoch)
        return itertools.chain(
            held,
            (
                unit
                for first, last in ((done, size), (0, done))
                for begin in range(first, last, UNITS_AT_ONCE)
                for unit in permute(
                    np.arange(begin, min(begin + UNITS_AT_ONCE, last)), size, key
                ).tolist()
                if unit not in held
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "sources": [
                {
                    "tokens": self._tokens[s],
                    "sequences": self._sequences[s],
                    "dealt": self._dealt[s],
                    "lanes": [list(cursor) for cursor in self._lanes[s]],
                }
                for s in range(len(self._lanes))
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sequence = state["sequence"]
        self._tokens = [s["tokens"] for s in state["sources"]]
        self._sequences = [s["sequences"] for s in state["sources"]]
        self._dealt = [s["dealt"] for s in state["sources"]]
        self._lanes = [[list(cursor) for cursor in s["lanes"]] for s in state["sources"]]

    def shares(self) -> list[float]:
        """The part of the delivered tokens that came from each source."""
        total = max(1, sum(self._tokens))
        return [tokens / total for tokens in self._tokens]

    def _choose_source(self, length: int) -> int:
        after = sum(self._tokens) + length
        behind = [w * after - t for w, t in zip(self._weights, self._tokens, strict=True)]
        return behind.index(max(behind))

    def _epoch_key(self, source: int, epoch: int) -> int:
        return make_key(self._seed, source, epoch)

    def _compute_unit(self, source: int, number: int) -> tuple[int, int]:
        """The unit that a source deals as its `number`-th, and the key of its documents' order."""
        size = self._num_units[source]
        epoch, index = divmod(number, size)
        key = self._epoch_key(source, epoch)
        unit = int(permute(np.array([index]), size, key)[0])
        return unit, make_key(key, unit)

    def _deal(self, source: int, cursor: list[int], length: int) -> None:
        number, units = self._dealt[source], self._num_units[source]
        if number >= units:  # or a lane could pass over the same few tokens many times a sequence
            self._require_a_sequence(source, length)
        if self._epochs is not None and number >= self._epochs * units:
            raise Exhausted
        cursor[:] = [number, 0]
        self._dealt[source] = number + 1

    def _require_a_sequence(self, source: int, length: int) -> None:
        if (source, length) in self._large_enough:
            return
        tokens = 0
        for unit in range(self._num_units[source]):
            tokens += self._count_tokens(source, unit)
            if tokens > length:
                self._large_enough.add((source, length))
                return
        raise SourceTooSmall(source, tokens)
