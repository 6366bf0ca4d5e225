"""Left context across ranks: what a convolution, a token shift or a window sees before a slice
starts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fla_dist.parallel.mesh import Mesh


def left_halo(x: Tensor, width: int, mesh: Mesh) -> Tensor:
    """The `width` tokens before this rank's slice, over as many ranks as they reach; zeros before
    the sequence's start.

    Args:
        x: [B, T, ...], this rank's slice, T the same on all ranks of the sequence.
        width: tokens of context, also more than T.

    Returns:
        [B, width, ...]; its gradient travels back to the ranks that hold the tokens.
    """
    return _LeftHalo.apply(x, width, mesh)


def _reach(width: int, length: int) -> list[tuple[int, int]]:
    """(hops to the left, tokens taken from there), nearest first."""
    return [
        (hop, min(length, width - (hop - 1) * length)) for hop in range(1, -(-width // length) + 1)
    ]


def _exchange(
    sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], mesh: Mesh
) -> None:
    """Point to point among the ranks of the sequence: (tensor, sequence-parallel rank) each."""
    first = mesh.rank - mesh.sequence_parallel_rank
    operations = [
        dist.P2POp(dist.isend, x, first + peer, group=mesh.sequence_group) for x, peer in sends
    ]
    operations += [
        dist.P2POp(dist.irecv, x, first + peer, group=mesh.sequence_group) for x, peer in receives
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, width, mesh):
        ctx.width, ctx.mesh, ctx.shape = width, mesh, x.shape
        rank, size, length = mesh.sequence_parallel_rank, mesh.sequence_parallel_size, x.shape[1]
        halo = x.new_zeros(x.shape[0], width, *x.shape[2:])
        sends, receives = [], []
        for hop, count in _reach(width, length):
            if rank + hop < size:
                sends.append((x[:, length - count :].contiguous(), rank + hop))
            if rank - hop >= 0:
                receives.append((x.new_empty(x.shape[0], count, *x.shape[2:]), rank - hop))
        _exchange(sends, receives, mesh)
        end = width
        for part, _ in receives:
            halo[:, end - part.shape[1] : end] = part
            end -= part.shape[1]
        return halo

    @staticmethod
    def backward(ctx, gradient):
        mesh, length = ctx.mesh, ctx.shape[1]
        rank, size = mesh.sequence_parallel_rank, mesh.sequence_parallel_size
        sends, receives = [], []
        end = ctx.width
        for hop, count in _reach(ctx.width, length):
            if rank - hop >= 0:
                sends.append((gradient[:, end - count : end].contiguous(), rank - hop))
            if rank + hop < size:
                receives.append(
                    (gradient.new_empty(ctx.shape[0], count, *ctx.shape[2:]), rank + hop)
                )
            end -= count
        _exchange(sends, receives, mesh)
        x_gradient = gradient.new_zeros(ctx.shape)
        for part, _ in receives:
            x_gradient[:, length - part.shape[1] :] += part
        return x_gradient, None, None
