"""Halos over slices of different lengths, some shorter than the halo, against one process."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.parallel.exchange import build_exchange
from fla_dist.parallel.mesh import build_mesh
from tests.parallel.ranks import run_ranks

LENGTHS = {"equal": (5, 5, 5, 5), "unequal": (9, 1, 3, 7)}
WIDTHS = (0, 1, 3, 5, 12, 30)
TOTAL = 20


def halos() -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Each halo, and the gradient that every rank's halo gives to this rank's slice."""
    mesh = build_mesh(4)
    rank = mesh.rank
    found = {}
    for name, lengths in LENGTHS.items():
        exchange = build_exchange(mesh, lengths)
        for width in WIDTHS:
            x = sequence().split(lengths, dim=1)[rank].requires_grad_()
            halo = exchange.before(x, width).wait()
            (halo * weight(width, rank)).sum().backward()
            assert x.grad is not None
            found[name, width] = halo.detach(), x.grad
    return found


def sequence() -> Tensor:
    return torch.arange(1.0, 2 * TOTAL * 3 + 1, dtype=torch.float64).view(2, TOTAL, 3)


def weight(width: int, rank: int) -> Tensor:
    return torch.arange(2 * width * 3, dtype=torch.float64).view(2, width, 3) + 100 * rank


def test_halos_reach_over_as_many_slices_as_they_need() -> None:
    for rank, found in enumerate(run_ranks(4, halos)):
        for (name, width), (halo, gradient) in found.items():
            lengths = LENGTHS[name]
            starts = [sum(lengths[:i]) for i in range(4)]
            padded = torch.cat([torch.zeros(2, width, 3, dtype=torch.float64), sequence()], dim=1)
            expected = torch.zeros_like(padded)
            for other, start in enumerate(starts):
                expected[:, start : start + width] += weight(width, other)
            assert torch.equal(halo, padded[:, starts[rank] : starts[rank] + width])
            assert torch.equal(gradient, expected[:, width:].split(lengths, dim=1)[rank])
