"""Compiled blocks over ranks: the same gradients, and one graph for all layers of a kind."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from fla_dist.models import LanguageModel
from fla_dist.parallel.mesh import Mesh, build_mesh
from tests.models.tiny import tiny_config
from tests.packing import STARTS, packed_tokens
from tests.parallel.ranks import run_ranks


def gradients(mesh: Mesh, mode: str, layers: int, compiled: bool) -> list[Tensor]:
    config = tiny_config("samba", num_hidden_layers=layers)
    model = LanguageModel(config, mesh=mesh, activation_checkpointing=mode, compiled=compiled)
    model.initialize(seed=0)
    batch = packed_tokens([STARTS["many documents"]], 37)
    model(batch.slice(mesh.sequence_parallel_rank, mesh.sequence_parallel_size)).backward()
    return [parameter.grad for parameter in model.parameters()]


def compare() -> tuple[dict[str, float], dict[int, int]]:
    mesh = build_mesh(2)
    errors, graphs = {}, {}
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        for mode in ("none", "full"):
            pairs = zip(
                gradients(mesh, mode, 2, True), gradients(mesh, mode, 2, False), strict=True
            )
            errors[mode] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        for layers in (4, 8):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            gradients(mesh, "none", layers, True)
            graphs[layers] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return errors, graphs


@pytest.mark.slow
def test_compiled_blocks_exchange_as_others_do() -> None:
    for errors, graphs in run_ranks(2, compare):
        assert max(errors.values()) <= 2e-6
        assert graphs[4] == graphs[8] > 0
