"""The whole model over 2 and 4 ranks against one process, in fp64: loss and every gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fla_dist.models import LanguageModel
from fla_dist.models.mixers import attention as windows
from fla_dist.parallel.mesh import Mesh, build_mesh
from tests.models.tiny import PATTERNS, tiny_config
from tests.packing import LENGTH, STARTS, packed_tokens
from tests.parallel.ranks import run_ranks

WORLD = 4
MODES = ("none", "selective", "full")
LAYOUTS = {"one document": [[0], [0]], "documents": list(STARTS.values())}
"""Where documents start in each sequence of a batch."""
UNEQUAL = (46, 5)
"""Tokens of which 4 ranks get different numbers; of 5 they get fewer than a convolution sees."""


def outcome(
    pattern: str, layout: str, mode: str, mesh: Mesh, length: int = LENGTH
) -> list[torch.Tensor]:
    """Loss and gradients of the first `length` tokens."""
    model = LanguageModel(tiny_config(pattern), mesh=mesh, activation_checkpointing=mode)
    model.initialize(seed=0)
    model.double()
    batch = packed_tokens(LAYOUTS[layout], 37, length=length)
    batch = batch.slice(mesh.sequence_parallel_rank, mesh.sequence_parallel_size)
    with mock.patch.object(windows, "BLOCK", 4):  # slices with queries that see no halo
        loss = model(batch)
        loss.backward()
    tensors = [loss.detach(), *(p.grad for p in model.parameters())]
    if mesh.sequence_parallel_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=mesh.sequence_group)
    return tensors


def all_cases() -> dict[tuple[str, str, str, int], float]:
    torch.set_num_threads(1)
    meshes = {size: build_mesh(size) for size in (2, 4)}
    # Two hosts of two ranks: hierarchical states, and attention by a ring.
    hosts = build_mesh(4, ranks_per_host=2, attention_exchange="ring")
    assert hosts.state_exchange == "hierarchical"
    errors = {}
    for pattern in PATTERNS:
        for layout in LAYOUTS:
            expected = outcome(pattern, layout, "none", Mesh())
            for mode in MODES:
                for size, mesh in meshes.items():
                    if size == 4 and mode != "selective":
                        mesh = hosts
                    got = outcome(pattern, layout, mode, mesh)
                    errors[pattern, layout, mode, size] = largest_error(got, expected)
    for length in UNEQUAL:
        expected = outcome("all", "documents", "none", Mesh(), length)
        got = outcome("all", "documents", "full", hosts, length)
        errors["all", f"{length} tokens", "full", 4] = largest_error(got, expected)
    return errors


def largest_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(
        ((x - y).norm() / (y.norm() or 1)).item() for x, y in zip(got, expected, strict=True)
    )


@pytest.fixture(scope="module")
def errors() -> list[dict[tuple[str, str, str, int], float]]:
    return run_ranks(WORLD, all_cases)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_divided_equals_whole(errors, pattern: str, layout: str, mode: str, size: int) -> None:
    for of_rank in errors:
        assert of_rank[pattern, layout, mode, size] <= 1e-10


@pytest.mark.parametrize("length", UNEQUAL)
def test_slices_of_different_lengths(errors, length: int) -> None:
    for of_rank in errors:
        assert of_rank["all", f"{length} tokens", "full", 4] <= 1e-10


def test_recomputation_exchanges_nothing() -> None:
    """Full checkpointing makes as many collective calls as none."""
    for counts in run_ranks(2, count_exchanges):
        assert counts["full"] == counts["none"] > 0


def count_exchanges() -> dict[str, int]:
    from torch.profiler import ProfilerActivity, profile

    counts = {}
    mesh = build_mesh(2)
    for mode in ("none", "full"):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            outcome("all", "documents", mode, mesh)
        counts[mode] = sum(
            event.count
            for event in recorded.key_averages()
            if event.key.startswith("gloo:") and "all_reduce" not in event.key
        )
    return counts
