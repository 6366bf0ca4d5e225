"""Blocks through torch.compile: one graph a kind of block, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.mamba import op as mamba
from fla_dist.kernels.short_convolution import op as convolution
from fla_dist.kernels.swiglu import op as swiglu
from fla_dist.models import LanguageModel, block
from fla_dist.models.block import Block
from fla_dist.models.stream import Stream
from fla_dist.parallel.mesh import Mesh, build_mesh
from tests.models.tiny import tiny_config
from tests.packing import packed_tokens
from tests.parallel.ranks import run_ranks


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def without_code_generation(
    function: Callable[..., Tensor], *, fullgraph: bool
) -> Callable[..., Tensor]:
    return torch.compile(function, backend="aot_eager", dynamic=False, fullgraph=fullgraph)


def gradients(
    pattern: str,
    mode: str,
    compiled: bool,
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
    layers: int = 4,
) -> list[Tensor]:
    config = tiny_config(pattern, num_hidden_layers=layers)
    model = LanguageModel(config, mesh=mesh, activation_checkpointing=mode, compiled=compiled)
    model.initialize(seed=0)
    model.double()
    batch = packed_tokens([[0, 20], [0]], 37)
    loss = model(batch.slice(mesh.sequence_parallel_rank, mesh.sequence_parallel_size))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("pattern", "mode", "fullgraph"),
    [
        ("attention", "none", True),
        ("attention", "selective", True),
        ("attention", "full", True),
        # The plain scan breaks its graph; that of its kernels is captured below.
        pytest.param("samba", "none", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_change_nothing(
    pattern: str, mode: str, fullgraph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(pattern, mode, False)
    monkeypatch.setattr(block, "_compiled", partial(without_code_generation, fullgraph=fullgraph))
    for got, truth in zip(gradients(pattern, mode, True), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)
    if fullgraph:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for four blocks


@pytest.mark.slow
def test_exchanges_break_graphs_beside_the_operators() -> None:
    """On ranks of one sequence the numbers are the same, and layers share their graphs."""
    for errors, graphs in run_ranks(2, compiled_on_ranks):
        assert max(errors) < 1e-12
        assert graphs[4] == graphs[8] > 0


def compiled_on_ranks() -> tuple[list[float], dict[int, int]]:
    torch.set_num_threads(1)
    mesh = build_mesh(2)
    block._compiled = partial(without_code_generation, fullgraph=False)
    errors = []
    for pattern, mode in (("samba", "none"), ("attention", "selective"), ("attention", "full")):
        outcomes = [gradients(pattern, mode, compiled, mesh) for compiled in (False, True)]
        errors += [(a - b).abs().max().item() for a, b in zip(*outcomes, strict=True)]
    graphs = {}
    for layers in (4, 8):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        gradients("samba", "none", True, mesh, layers)
        graphs[layers] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return errors, graphs


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mamba", Block._whole),
        ("mamba", Block._selective),
        ("sliding_window_attention", Block._whole),
    ],
)
def test_a_block_is_one_graph(
    name: str, function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where these ops are kernels; the graph is captured, and not run."""
    monkeypatch.setattr(mamba, "capability", lambda x: 90)
    monkeypatch.setattr(convolution, "capability", lambda x: 90)
    monkeypatch.setattr(convolution, "CHECKED", (4,))
    monkeypatch.setattr(swiglu, "CHECKED", (0,))
    graphs: list[torch.fx.GraphModule] = []

    class Captured(Exception):
        pass

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        raise Captured

    model = LanguageModel(tiny_config("all", layer_pattern=(name,), num_hidden_layers=1))
    batch = packed_tokens([[0, 20], [0]], 37)
    stream = Stream(batch.positions, batch.doc_ids, model.exchange)
    model.blocks[0].mixer.prepare(stream)
    compiled = torch.compile(function, backend=capture, dynamic=False, fullgraph=True)
    with pytest.raises(Exception, match="Captured"):
        compiled(model.blocks[0], torch.randn(2, 48, 16), stream)
    assert len(graphs) == 1
