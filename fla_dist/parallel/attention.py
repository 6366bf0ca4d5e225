"""Full softmax across ranks: every rank gathers the keys and values of the ranks before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.parallel.collectives import all_gather, reduce_scatter
from fla_dist.parallel.mesh import Mesh


def gather_before(x: Tensor, mesh: Mesh) -> Tensor:
    """All tokens of the sequence before this rank's slice.

    Args:
        x: [B, T, ...], this rank's slice, T the same on all ranks of the sequence.

    Returns:
        [B, sequence_parallel_rank · T, ...]; its gradient is summed over ranks and
        scattered to those that hold the tokens.
    """
    return _GatherBefore.apply(x, mesh)


class _GatherBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh, ctx.shape = mesh, x.shape
        gathered = x.new_empty(mesh.sequence_parallel_size, *x.shape)
        all_gather(gathered.view(-1), x.contiguous().view(-1), group=mesh.sequence_group)
        before = gathered[: mesh.sequence_parallel_rank]
        return before.transpose(0, 1).reshape(x.shape[0], -1, *x.shape[2:])

    @staticmethod
    def backward(ctx, gradient):
        mesh, shape = ctx.mesh, ctx.shape
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        rank, size = mesh.sequence_parallel_rank, mesh.sequence_parallel_size
        scattered = gradient.new_zeros(size, *shape, dtype=dtype)
        scattered[:rank] = gradient.reshape(shape[0], rank, *shape[1:]).transpose(0, 1)
        own = gradient.new_empty(shape, dtype=dtype)
        reduce_scatter(own.view(-1), scattered.view(-1), group=mesh.sequence_group)
        return own.to(gradient.dtype), None
