"""How a sequence lies on its ranks, as the exchanges of one layer see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

from torch.distributed import Work

from fla_dist.parallel.mesh import Mesh
from fla_dist.parallel.watch import current_watch, explained


def slice_lengths(length: int, size: int) -> tuple[int, ...]:
    """Tokens of each of `size` ranks' slices of a sequence: equal, or the first ones a token
    longer."""
    shorter, longer = divmod(length, size)
    return (shorter + 1,) * longer + (shorter,) * (size - longer)


@dataclass(frozen=True)
class Slices:
    """The slices of a sequence, and the ranks that hold them.

    Attributes:
        lengths: tokens of each rank's slice, known to all; None where all are as long as this
            rank's.
        layer: whose exchanges these are, for messages.
        exposed: what times the waiting for exchanges, if anything.
    """

    mesh: Mesh
    lengths: tuple[int, ...] | None = None
    layer: int | None = None
    exposed: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def rank(self) -> int:
        return self.mesh.sequence_parallel_rank

    @property
    def size(self) -> int:
        return self.mesh.sequence_parallel_size

    def lengths_beside(self, length: int) -> tuple[int, ...]:
        """Tokens of each rank's slice, this rank's being `length`."""
        lengths = self.lengths or (length,) * self.size
        assert lengths[self.rank] == length and len(lengths) == self.size
        return lengths

    def parts_before(self, length: int, width: int) -> list[list[tuple[int, int, int]]]:
        """For each rank, where the `width` tokens before its slice lie: (rank, start, stop) of
        slices, in the order of time."""
        lengths = self.lengths_beside(length)
        starts = list(accumulate(lengths, initial=0))
        parts: list[list[tuple[int, int, int]]] = []
        for rank in range(self.size):
            first = max(starts[rank] - width, 0)
            parts.append(
                [
                    (other, max(first - starts[other], 0), lengths[other])
                    for other in range(rank)
                    if starts[other + 1] > max(first, starts[other])
                ]
            )
        return parts

    def naming(self, phase: str) -> AbstractContextManager[None]:
        """Turns what a collective raises into an ExchangeError that names ranks, layer and
        phase."""
        return explained(self._label(phase), self._ranks)

    def begin(self, phase: str) -> None:
        """Tells the watch that an exchange begins."""
        if watch := current_watch():
            watch.begin(self._label(phase))

    def watch(self, phase: str, works: list[Work]) -> None:
        """Puts collectives under way under the watch."""
        if watch := current_watch():
            for work in works:
                watch.add(self._label(phase), self._ranks, work)

    @property
    def _ranks(self) -> range:
        first = self.mesh.first_sequence_rank
        return range(first, first + self.size)

    def _label(self, phase: str) -> str:
        return phase if self.layer is None else f"layer {self.layer}, {phase}"
