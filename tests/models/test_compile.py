"""Blocks through torch.compile: one graph a kind of block, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

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


def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops are traced as on a GPU, where they are kernels; none can run."""
    monkeypatch.setattr(mamba, "capability", lambda x: 90)
    monkeypatch.setattr(convolution, "capability", lambda x: 90)
    monkeypatch.setattr(convolution, "CHECKED", (4,))
    monkeypatch.setattr(swiglu, "CHECKED", (0,))


def test_what_a_compiled_block_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every token once, and only what is costly to make again: of the residual stream what norms
    made of it alone; no output of the convolution, none of the scan, no argument of its steps."""
    with_kernels(monkeypatch)
    kept: list[Tensor] = []

    def partition(graph: Any, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        options["compiler"] = "inductor"
        forward, _ = min_cut_rematerialization_partition(
            graph, inputs, num_fwd_outputs=num_fwd_outputs, **options
        )
        (outputs,) = next(n for n in forward.graph.nodes if n.op == "output").args
        values = [node.meta["val"] for node in outputs[num_fwd_outputs:]]
        kept.extend(value for value in values if isinstance(value, Tensor))
        raise Captured

    class Captured(Exception):
        pass

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=partition)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    block._compiled.cache_clear()
    model = LanguageModel(tiny_config("all", layer_pattern=("mamba",), num_hidden_layers=1))
    stream = Stream(torch.arange(96)[None], torch.zeros(1, 96, dtype=torch.int32), model.exchange)
    with pytest.raises(Exception, match="Captured"):
        block._compiled(Block._whole)(
            model.blocks[0], torch.randn(1, 96, 16, requires_grad=True), stream
        )
    block._compiled.cache_clear()
    mixer, mlp = model.blocks[0].mixer, model.blocks[0].mlp
    channels, size = mixer.A_log.shape
    of_tokens = [x for x in kept if x.is_floating_point() and {96, 96 // 16} & set(x.shape)]
    expected = (
        2 * 16  # what the norms gave, without gains
        + 2  # scales of the norms
        + 2 * channels  # both halves of the first projection
        + mixer.sizes[0] + 2 * size  # Δ's factor, B, C
        + channels * max(size, 4) / 16  # states before every 16th token
        + mlp.gate_up.weight.shape[0]
    )  # fmt: skip
    assert sum(x.numel() for x in of_tokens) / 96 == expected


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
    """The graph is captured, and not run."""
    with_kernels(monkeypatch)
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
