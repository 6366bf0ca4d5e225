"""All that a mixer may ask of the other ranks of its sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from fla_dist.kernels.state import LOCAL, Diagonal, Pending, Scan
from fla_dist.parallel.attention import gather_before
from fla_dist.parallel.halo import left_halo
from fla_dist.parallel.mesh import Mesh
from fla_dist.parallel.state_scan import StateScan


class Exchange(Protocol):
    """The tokens and states before this slice.

    Attributes:
        scan: joins recurrent states.
    """

    scan: Scan

    def before(self, x: Tensor, width: int | None) -> Tensor:
        """The `width` tokens before x [B, T, ...], zeros where the sequence had not started; all
        there are for None."""


class LocalExchange:
    """One process holds the whole sequence."""

    scan: Scan = LOCAL

    def before(self, x: Tensor, width: int | None) -> Tensor:
        return x.new_zeros(x.shape[0], width or 0, *x.shape[2:])


class MeshExchange:
    """The sequence is divided over the ranks of `mesh.sequence_group`."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.scan: Scan = StateScan(mesh)

    def before(self, x: Tensor, width: int | None) -> Tensor:
        return gather_before(x, self._mesh) if width is None else left_halo(x, width, self._mesh)


class ReplayedExchange:
    """An exchange under activation checkpointing: what the forward received is kept, and
    recomputation sends nothing.

    `contexts` is the `context_fn` of torch.utils.checkpoint.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._received: list[Any] = []
        self._replay: Iterator[Any] | None = None
        self.scan: Scan = self

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._replaying()

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        self._replay = iter(self._received)
        try:
            yield
        finally:
            self._replay = None

    def before(self, x: Tensor, width: int | None) -> Tensor:
        if self._replay is not None:
            return next(self._replay)
        result = self._exchange.before(x, width)
        self._received.append(result.detach())
        return result

    def start(
        self,
        transition: Diagonal,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> Pending:
        if self._replay is not None:
            return next(self._replay)
        if isinstance(reverse_of, RecordedScan):
            return self._exchange.scan.start(
                transition, state, initial, reverse_of=reverse_of.pending
            )
        recorded = RecordedScan(self._exchange.scan.start(transition, state, initial))
        self._received.append(recorded)
        return recorded


class RecordedScan:
    """A scan that can be waited for again."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.transition = pending.transition
        self._result: tuple[Tensor, Tensor] | None = None

    def wait(self) -> tuple[Tensor, Tensor]:
        if self._result is None:
            self._result = self.pending.wait()
        entries, final = self._result
        return entries.detach(), final.detach()


def build_exchange(mesh: Mesh | None) -> Exchange:
    if mesh is None or mesh.sequence_parallel_size == 1:
        return LocalExchange()
    return MeshExchange(mesh)
