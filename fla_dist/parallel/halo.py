"""Left context across ranks: what a convolution, a token shift or a window sees before a slice
starts."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.parallel.collectives import Steps, exchange, send_and_receive
from fla_dist.parallel.slices import Slices


def left_halo(x: Tensor, width: int, slices: Slices) -> Tensor:
    """The `width` tokens before this rank's slice, over as many ranks as they reach; zeros before
    the sequence's start.

    Args:
        x: [B, T, ...], this rank's slice.
        width: tokens of context, also more than T.

    Returns:
        [B, width, ...]; its gradient travels back to the ranks that hold the tokens.
    """
    return _LeftHalo.apply(x, width, slices)


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, width, slices):
        ctx.width, ctx.slices, ctx.shape = width, slices, x.shape
        return exchange(_to_the_right(x, width, slices), slices, "halo, forward")

    @staticmethod
    def backward(ctx, gradient):
        steps = _to_the_left(gradient, ctx.shape, ctx.slices)
        return exchange(steps, ctx.slices, "halo, backward"), None, None


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
