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
        self._link = _Link(slices, width, x.shape[1])
        self._token = _Start.apply(self._link, x)

    @torch.compiler.disable
    def wait(self) -> Tensor:
        return _Wait.apply(self._link, self._token)


class _Link:
    """What the two ends of a halo tell each other. It holds no tensor that they made: one whose
    grad_fn leads back here would be a cycle that is never freed."""

    def __init__(self, slices: Slices, width: int, length: int) -> None:
        self.slices, self.width, self.length = slices, width, length
        self._pending: Any = None

    def send(self, x: Tensor) -> None:
        """The end of the slice sets out to the ranks after this one."""
        self._start(_to_the_right(x, self), x, "forward")

    def send_back(self, gradient: Tensor) -> None:
        """The gradient of the halo sets out to the ranks whose tokens it is of."""
        self._start(_to_the_left(gradient, self), gradient, "backward")

    def _start(self, steps: Steps, sent: Tensor, direction: str) -> None:
        transfer = Transfer(steps, self.slices, f"halo, {direction}", sent.device)
        # On a GPU another stream still reads what is sent: it is held until then.
        self._pending = transfer, sent

    def wait(self) -> Tensor:
        (transfer, _), self._pending = self._pending, None
        return transfer.wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, x):
        ctx.link, ctx.shape = link, x.shape
        link.send(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        end = ctx.link.wait()
        gradient = end.new_zeros(ctx.shape)
        gradient[:, ctx.shape[1] - end.shape[1] :] = end
        return None, gradient


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, token):
        ctx.link = link
        return link.wait()

    @staticmethod
    def backward(ctx, gradient):
        ctx.link.send_back(gradient)
        return None, gradient.new_zeros(())


def with_halo(
    xs: tuple[Tensor, ...], width: int, slices: Slices, kept: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each of `xs` [B, T, ...], all of one shape, behind the tokens before it: as many of the
    `width` before the slice as there are. They are on their way while the slices are copied.

    The gradients of what it returns are changed in place: they must be nobody else's.

    Args:
        kept: what an earlier call with the same values returned last: under recomputation, nothing
            is sent.

    Returns:
        the slices behind their halos, and the halos as they came.
    """
    length = xs[0].shape[1]
    context = min(width, sum(slices.lengths_beside(length)[: slices.rank]))
    link = _Link(slices, width, length) if kept is None else _Kept(width, length, kept)
    *wholes, halo = _WithHalo.apply(link, context, *xs)
    return tuple(wholes), halo


def behind(halo: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each of `xs` [B, T, ...] behind its own tokens of `halo` [B, width, len(xs), ...]."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(halo.unbind(dim=2), xs, strict=True))


@dataclass(frozen=True)
class _Kept:
    """A link whose halo is there already."""

    width: int
    length: int
    halo: Tensor

    def send(self, x: Tensor) -> None:
        pass

    def wait(self) -> Tensor:
        return self.halo


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, context, *xs):
        ctx.link, ctx.context = link, context
        first = max(0, link.length - link.width)
        link.send(torch.stack([x[:, first:] for x in xs], dim=2))
        wholes = [x.new_empty(x.shape[0], context + x.shape[1], *x.shape[2:]) for x in xs]
        for whole, x in zip(wholes, xs, strict=True):
            whole[:, context:] = x
        halo = link.wait()
        before = halo[:, link.width - context :]
        for i, whole in enumerate(wholes):
            whole[:, :context] = before[:, :, i]
        halo = halo.view_as(halo)
        ctx.mark_non_differentiable(halo)
        return *wholes, halo

    @staticmethod
    def backward(ctx, *all_gradients):
        *gradients, _ = all_gradients
        context = ctx.context
        ctx.link.send_back(torch.stack([gradient[:, :context] for gradient in gradients], dim=2))
        end = ctx.link.wait()
        for gradient, more in zip(gradients, end.unbind(dim=2), strict=True):
            gradient[:, gradient.shape[1] - end.shape[1] :] += more
        return None, None, *(gradient[:, context:] for gradient in gradients)


def _to_the_right(x: Tensor, link: _Link) -> Steps:
    """The link's `width` tokens before the slice, from x [B, n, ...], the end of the slice as far
    as halos may reach, or more of it."""
    slices = link.slices
    rank, first = slices.rank, slices.mesh.first_sequence_rank
    parts = slices.parts_before(link.length, link.width)
    missing = link.length - x.shape[1]
    sends = [
        (x[:, start - missing : stop - missing].contiguous(), first + other)
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
    missing = link.width - sum(part.shape[1] for part in received)
    return torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), *received], dim=1)


def _to_the_left(gradient: Tensor, link: _Link) -> Steps:
    """The gradient of the slice's end, as far as halos may reach, from that of every halo that
    holds tokens of it; `gradient` is of this rank's halo, or of its end."""
    slices = link.slices
    rank, first = slices.rank, slices.mesh.first_sequence_rank
    parts = slices.parts_before(link.length, link.width)
    sends, stop = [], gradient.shape[1]
    for source, begin, end in reversed(parts[rank]):
        part = gradient[:, stop - (end - begin) : stop]
        sends.append((part.contiguous(), first + source))
        stop -= end - begin
    places = [
        (other, begin, end)
        for other in range(rank + 1, slices.size)
        for source, begin, end in parts[other]
        if source == rank
    ]
    receives = [
        (gradient.new_empty(gradient.shape[0], end - begin, *gradient.shape[2:]), first + other)
        for other, begin, end in places
    ]
    yield send_and_receive(sends, receives, slices.mesh.sequence_group)
    reach = min(link.width, link.length)
    whole = gradient.new_zeros(gradient.shape[0], reach, *gradient.shape[2:])
    missing = link.length - reach
    for (part, _), (_, begin, end) in zip(receives, places, strict=True):
        whole[:, begin - missing : end - missing] += part
    return whole
