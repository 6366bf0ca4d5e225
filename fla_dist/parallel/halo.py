"""Left context across ranks: what a convolution, a token shift or a window sees before a slice
starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fla_dist.parallel.collectives import Steps, Transfer, send_and_receive
from fla_dist.parallel.slices import Slices


class PendingHalo(Protocol):
    """Left context that may still be on its way."""

    def wait(self) -> Tensor:
        """[B, width, ...]. Called once."""


@dataclass(frozen=True)
class Arrived:
    """Left context that is there."""

    tokens: Tensor

    def wait(self) -> Tensor:
        return self.tokens


class LeftHalo:
    """The `width` tokens before this rank's slice, over as many ranks as they reach; zeros before
    the sequence's start. What is computed between its making and `wait` overlaps with the exchange.

    The backward overlaps likewise: the gradient sets out, back to the ranks that hold the tokens,
    where the forward waited, and is waited for where the forward set out. So every rank must use
    what `wait` gives, also where it is all zeros.

    Args:
        x: [B, T, ...], this rank's slice.
        width: tokens of context, also more than T.
    """

    def __init__(self, x: Tensor, width: int, slices: Slices) -> None:
        self._link = _Link(slices, width, x.shape)
        self._token = _Start.apply(self._link, x)

    @torch.compiler.disable
    def wait(self) -> Tensor:
        return _Wait.apply(self._link, self._token)


class _Link:
    """What the two ends of a halo tell each other. It holds no tensor that they made: one whose
    grad_fn leads back here would be a cycle that is never freed."""

    def __init__(self, slices: Slices, width: int, shape: torch.Size) -> None:
        self.slices, self.width, self.shape = slices, width, shape
        self._pending: Any = None

    def start(self, steps: Steps, sent: Tensor, direction: str) -> None:
        transfer = Transfer(steps, self.slices, f"halo, {direction}", sent.device)
        # On a GPU another stream still reads what is sent: it is held until then.
        self._pending = transfer, sent

    def wait(self) -> Tensor:
        (transfer, _), self._pending = self._pending, None
        return transfer.wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, x):
        ctx.link = link
        link.start(_to_the_right(x, link.width, link.slices), x, "forward")
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, ctx.link.wait()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, token):
        ctx.link = link
        return link.wait()

    @staticmethod
    def backward(ctx, gradient):
        link = ctx.link
        link.start(_to_the_left(gradient, link.shape, link.slices), gradient, "backward")
        return None, gradient.new_zeros(())


def _to_the_right(x: Tensor, width: int, slices: Slices) -> Steps:
    rank, first = slices.rank, slices.mesh.first_sequence_rank
    parts = slices.parts_before(x.shape[1], width)
    sends = [
        (x[:, start:stop].contiguous(), first + other)
        for other in range(rank + 1, slices.size)
        for source, start, stop in parts[other]
        if source == rank
    ]
    receives = [
        (x.new_empty(x.shape[0], stop - start, *x.shape[2:]), first + source)
        for source, start, stop in parts[rank]
    ]
    yield send_and_receive(sends, receives, slices.mesh.sequence_group)
    received = [part for part, _ in receives]
    missing = width - sum(part.shape[1] for part in received)
    return torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), *received], dim=1)


def _to_the_left(gradient: Tensor, shape: torch.Size, slices: Slices) -> Steps:
    """The gradient of a slice of `shape`, from that of every halo that holds tokens of it."""
    rank, first = slices.rank, slices.mesh.first_sequence_rank
    parts = slices.parts_before(shape[1], gradient.shape[1])
    sends, end = [], gradient.shape[1]
    for source, start, stop in reversed(parts[rank]):
        part = gradient[:, end - (stop - start) : end]
        sends.append((part.contiguous(), first + source))
        end -= stop - start
    places = [
        (other, start, stop)
        for other in range(rank + 1, slices.size)
        for source, start, stop in parts[other]
        if source == rank
    ]
    receives = [
        (gradient.new_empty(shape[0], stop - start, *shape[2:]), first + other)
        for other, start, stop in places
    ]
    yield send_and_receive(sends, receives, slices.mesh.sequence_group)
    whole = gradient.new_zeros(shape)
    for (part, _), (_, start, stop) in zip(receives, places, strict=True):
        whole[:, start:stop] += part
    return whole
