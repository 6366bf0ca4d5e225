"""All that a mixer may ask of the other ranks of its sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fla_dist.kernels.attention import attention
from fla_dist.kernels.state import LOCAL, Pending, Scan, Transition
from fla_dist.parallel.attention import (
    Masks,
    Way,
    attention_way,
    full_attention,
)
from fla_dist.parallel.halo import Arrived, LeftHalo, PendingHalo, with_halo
from fla_dist.parallel.mesh import Mesh
from fla_dist.parallel.slices import Slices
from fla_dist.parallel.state_scan import StateScan


class Exchange(Protocol):
    """The tokens and states before this slice.

    Attributes:
        scan: joins recurrent states.
    """

    scan: Scan

    def before(self, x: Tensor, width: int) -> PendingHalo:
        """Sets out for the `width` tokens before x [B, T, ...], zeros where the sequence had not
        started; what needs none is computed before they are waited for."""

    def with_halo(self, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        """Each of `xs` [B, T, ...] behind as many of the `width` tokens before it as there are;
        what uses them must leave their gradients to them alone."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        """Full causal softmax attention of q [B, T, H, K] to the whole sequence's k and v
        [B, T, G, K] up to each query, inside documents; [B, T, H, K]."""

    def prepare_attention(self, heads: int, kv_heads: int, masks: Masks) -> None:
        """Makes what the layers of a batch share for `attention`; it may wait for the GPU."""

    def of_layer(self, index: int) -> Exchange:
        """The same for one layer, which messages then name."""

    def of_lengths(self, lengths: tuple[int, ...] | None) -> Exchange:
        """The same for slices of these lengths; None where all are equal."""

    def tokens_before(self, length: int) -> int:
        """Of the sequence, on the ranks before this one, whose slice has `length`."""


class LocalExchange:
    """One process holds the whole sequence."""

    scan: Scan = LOCAL

    def before(self, x: Tensor, width: int) -> Arrived:
        return Arrived(x.new_zeros(x.shape[0], width, *x.shape[2:]))

    def with_halo(self, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        return xs

    def attention(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        return attention(q, k, v, masks.attention_mask(None, 0))

    def prepare_attention(self, heads: int, kv_heads: int, masks: Masks) -> None:
        masks.attention_mask(None, 0)

    def of_layer(self, index: int) -> LocalExchange:
        return self

    def of_lengths(self, lengths: tuple[int, ...] | None) -> LocalExchange:
        return self

    def tokens_before(self, length: int) -> int:
        return 0


class MeshExchange:
    """The sequence is divided over the ranks of `slices`."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices
        self.scan: Scan = StateScan(slices)

    @torch.compiler.disable
    def before(self, x: Tensor, width: int) -> LeftHalo:
        return LeftHalo(x, width, self.slices)

    @torch.compiler.disable
    def with_halo(self, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        return with_halo(xs, width, self.slices)[0]

    @torch.compiler.disable
    def attention(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        return full_attention(q, k, v, self.way(q, k, masks))[0]

    def way(self, q: Tensor, k: Tensor, masks: Masks) -> Way:
        return attention_way(q.shape[2], k.shape[2], self.slices, masks)

    def prepare_attention(self, heads: int, kv_heads: int, masks: Masks) -> None:
        attention_way(heads, kv_heads, self.slices, masks)

    def of_layer(self, index: int) -> MeshExchange:
        return MeshExchange(replace(self.slices, layer=index))

    def of_lengths(self, lengths: tuple[int, ...] | None) -> MeshExchange:
        return MeshExchange(replace(self.slices, lengths=lengths))

    def tokens_before(self, length: int) -> int:
        return sum(self.slices.lengths_beside(length)[: self.slices.rank])


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

    def before(self, x: Tensor, width: int) -> PendingHalo:
        if self._replay is not None:
            return next(self._replay)
        recorded = RecordedHalo(self._exchange.before(x, width))
        self._received.append(recorded)
        return recorded

    @torch.compiler.disable
    def with_halo(self, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        if not isinstance(self._exchange, MeshExchange):
            return self._exchange.with_halo(xs, width)
        kept = None if self._replay is None else next(self._replay)
        wholes, halo = with_halo(xs, width, self._exchange.slices, kept)
        if kept is None:
            self._received.append(halo)
        return wholes

    @torch.compiler.disable
    def attention(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        if not isinstance(self._exchange, MeshExchange):
            return self._exchange.attention(q, k, v, masks)
        way = self._exchange.way(q, k, masks)
        if self._replay is not None:
            return full_attention(q, k, v, way, next(self._replay))[0]
        o, lse = full_attention(q, k, v, way)
        self._received.append((o.detach(), lse))
        return o

    def prepare_attention(self, heads: int, kv_heads: int, masks: Masks) -> None:
        self._exchange.prepare_attention(heads, kv_heads, masks)

    def of_layer(self, index: int) -> ReplayedExchange:
        return ReplayedExchange(self._exchange.of_layer(index))

    def of_lengths(self, lengths: tuple[int, ...] | None) -> ReplayedExchange:
        return ReplayedExchange(self._exchange.of_lengths(lengths))

    def tokens_before(self, length: int) -> int:
        return self._exchange.tokens_before(length)

    def start(
        self,
        transition: Transition,
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


class RecordedHalo:
    """A halo that can be waited for again, then as values only."""

    def __init__(self, pending: PendingHalo) -> None:
        self._pending: PendingHalo | None = pending
        self._tokens: Tensor | None = None

    def wait(self) -> Tensor:
        if self._tokens is not None:
            return self._tokens
        assert self._pending is not None
        tokens, self._pending = self._pending.wait(), None
        self._tokens = tokens.detach()
        return tokens


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


def build_exchange(mesh: Mesh | None, lengths: tuple[int, ...] | None = None) -> Exchange:
    """What the ranks of `mesh` exchange; `lengths` where their slices differ."""
    if mesh is None or mesh.sequence_parallel_size == 1:
        return LocalExchange()
    return MeshExchange(Slices(mesh, lengths))
