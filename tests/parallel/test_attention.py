"""Full attention over ranks in its three ways against one process, in fp64: output and every
gradient, with documents, unequal slices, and groups of heads."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fla_dist.kernels.attention import stretch
from fla_dist.kernels.attention.reference import attention_dense
from fla_dist.parallel import attention as ways
from fla_dist.parallel.attention import choose
from fla_dist.parallel.exchange import ReplayedExchange, build_exchange
from fla_dist.parallel.mesh import Mesh, build_mesh
from tests.packing import LENGTH, STARTS, positions_of
from tests.parallel.ranks import run_ranks

WORLD = 4
LENGTHS = {"equal": (12,) * 4, "unequal": (17, 3, 20, 8)}
NAMES = ("all_gather", "by head groups", "all_to_all", "ring", "replayed")


@dataclass
class Masks:
    positions: Tensor
    made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, LENGTH, heads, 6) for heads in (8, 4, 4)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def weights() -> Tensor:
    return torch.arange(2 * LENGTH * 8 * 6, dtype=torch.float64).view(2, LENGTH, 8, 6).sin()


def whole(positions: Tensor) -> list[Tensor]:
    qkv = [x.requires_grad_() for x in inputs()]
    o = attention_dense(*qkv, positions, None)
    return [o.detach(), *torch.autograd.grad((o * weights()).sum(), qkv)]


def divided(name: str, positions: Tensor, lengths: tuple[int, ...], mesh: Mesh) -> list[Tensor]:
    rank = mesh.sequence_parallel_rank
    way = {"by head groups": "all_gather", "replayed": "ring"}.get(name, name)
    exchange = build_exchange(replace(mesh, attention_exchange=way), lengths)
    qkv = [x.split(lengths, dim=1)[rank].requires_grad_() for x in inputs()]
    masks = Masks(positions.split(lengths, dim=1)[rank])
    if name == "replayed":
        replayed = ReplayedExchange(exchange)
        forward, again = replayed.contexts()
        with forward:
            first = replayed.attention(*qkv, masks)
        with again, mock.patch.object(dist, "batch_isend_irecv", side_effect=AssertionError):
            o = replayed.attention(*qkv, masks)
        assert torch.equal(o, first)
    else:
        o = exchange.attention(*qkv, masks)
    loss = (o * weights().split(lengths, dim=1)[rank]).sum()
    return [o.detach(), *torch.autograd.grad(loss, qkv)]


def all_cases() -> dict[tuple[str, str, str], float]:
    mesh = build_mesh(WORLD)
    errors = {}
    for starts in STARTS:
        positions = positions_of(STARTS[starts]).expand(2, -1)
        expected = whole(positions)
        for kind, lengths in LENGTHS.items():
            for name in NAMES:
                groups = 1 if name == "by head groups" else ways.GATHERED_BYTES
                with (
                    mock.patch.object(ways, "GATHERED_BYTES", groups),
                    mock.patch.multiple(stretch, QUERY_BLOCK=7, KEY_BLOCK=5),
                ):
                    got = divided(name, positions, lengths, mesh)
                errors[name, starts, kind] = max(
                    (x - y.split(lengths, dim=1)[mesh.rank]).abs().max().item()
                    for x, y in zip(got, expected, strict=True)
                )
    return errors


@pytest.fixture(scope="module")
def errors() -> list[dict[tuple[str, str, str], float]]:
    return run_ranks(WORLD, all_cases)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_divided_equals_whole(errors, name: str, lengths: str) -> None:
    for of_rank in errors:
        for starts in STARTS:
            assert of_rank[name, starts, lengths] <= 1e-12, starts


def test_the_choice() -> None:
    inside = Mesh(world_size=8, sequence_parallel_size=4, ranks_per_host=8)
    across = Mesh(world_size=16, sequence_parallel_size=16, ranks_per_host=8)
    assert choose(inside, 16, 16, 8192) == "all_to_all"
    assert choose(inside, 16, 2, 8192) == "all_gather"  # two key-value heads over four ranks
    assert choose(across, 16, 16, 8192) == "ring"
    assert choose(across, 16, 16, 8191) == "all_gather"
    assert choose(across, 16, 4, 2048) == "ring"  # a quarter of the bytes to hide
    assert choose(replace(across, attention_exchange="all_gather"), 16, 16, 1 << 20) == "all_gather"


def test_heads_that_ranks_cannot_share_out_are_refused() -> None:
    mesh = Mesh(world_size=4, sequence_parallel_size=4, attention_exchange="all_to_all")
    exchange = build_exchange(mesh)
    with pytest.raises(ValueError, match="attention_exchange is 'all_to_all', expected 4 ranks"):
        exchange.prepare_attention(8, 2, Masks(torch.zeros(1, 3, dtype=torch.int32)))
