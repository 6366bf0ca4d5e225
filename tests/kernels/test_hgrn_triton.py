"""HGRN's Triton kernels against the recurrence in fp64: in Triton's interpreter where there is no
GPU, in every dtype where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.hgrn import steps
from fla_dist.kernels.hgrn.op import segmented_hgrn
from fla_dist.kernels.hgrn.reference import hgrn_recurrent
from fla_dist.kernels.state import LOCAL
from tests.kernels.interpreter import interpreted, run_interpreted
from tests.packing import doc_ids_of, positions_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("h", "final", "dx", "dg", "dinitial")


def make(batch: int, length: int, channels: int, decay: float) -> list[Tensor]:
    """x, g, initial_state.  decay: of the strongest gate; negative for gates that mix it with next
    to none."""
    generator = torch.Generator().manual_seed(length + channels)
    x = torch.randn(batch, length, channels, generator=generator)
    g = -abs(decay) * torch.rand(batch, length, channels, generator=generator)
    if decay < 0:
        g *= (torch.rand(g.shape, generator=generator) < 0.3) + 1e-4
    return [x, g, torch.randn(batch, channels, generator=generator)]


def doc_ids(length: int) -> Tensor:
    """Two sequences: one starts with a document, the other goes on with initial_state's."""
    starts = sorted({0, length // 3, length // 2, length - 1})
    positions = torch.stack([positions_of(starts, length)] * 2)
    positions[1, : starts[1] if len(starts) > 1 else 1] += 5
    return doc_ids_of(positions)


def results(function, inputs: list[Tensor], ids: Tensor | None, state: bool) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    *tensors, initial = inputs
    outputs = function(*tensors, initial_state=initial if state else None, doc_ids=ids)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    wanted = inputs if state else tensors
    return [*outputs, *torch.autograd.grad(outputs, wanted, weights)]


def errors(
    function, inputs: list[Tensor], ids: Tensor | None, state: bool = True
) -> dict[str, float]:
    """Relative errors in the norm; NaN where something is not finite."""
    got = results(function, inputs, ids, state)
    exact = results(hgrn_recurrent, [x.double() for x in inputs], ids, state)
    return {
        name: ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item()
        for name, x, y in zip(NAMES, got, exact, strict=False)
    }


class OneStretch:
    """A scan other than LOCAL: what a scan over ranks gets to see."""

    def start(self, transition, state, initial, *, reverse_of=None):
        assert state.shape[1] == 1
        return LOCAL.start(transition, state, initial, reverse_of=reverse_of)


def over_ranks(*tensors, **keywords):
    return segmented_hgrn(*tensors, scan=OneStretch(), **keywords)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(
    ("length", "channels", "decay", "packed", "state", "ranks"),
    [
        (1, 3, 0.5, False, True, False),
        (15, 6, 30.0, True, True, False),
        (27, 3, 0.5, True, True, True),
        (52, 3, -30.0, True, False, False),
        (16, 4, 0.0, False, True, False),
    ],
)
def test_kernels(
    length: int, channels: int, decay: float, packed: bool, state: bool, ranks: bool, monkeypatch
) -> None:
    """Segments of 8 tokens, groups of 3: up to three groups."""
    small = steps.Settings(2, 4, 4, 2, group=3, block=4)
    monkeypatch.setattr(steps, "settings", lambda x, g, packed: small)
    ids = doc_ids(length) if packed else None
    function = over_ranks if ranks else segmented_hgrn
    found = errors(function, make(2, length, channels, decay), ids, state)
    assert all(error < 1e-5 for error in found.values()), found


@interpreted
def test_compiled_whole(monkeypatch) -> None:
    """Forward and backward without a break of the graph, and the same numbers."""
    small = steps.Settings(1, 4, 4, 4, group=3, block=4)
    monkeypatch.setattr(steps, "settings", lambda x, g, packed: small)
    inputs = make(1, 7, 2, 0.5)
    compiled = torch.compile(segmented_hgrn, backend="aot_eager", fullgraph=True)
    outcomes = [results(function, inputs, None, True) for function in (compiled, segmented_hgrn)]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("length", "channels", "decay", "packed", "state", "ranks"),
    [
        (1, 64, 0.5, False, True, False),
        (15, 40, 0.5, True, True, True),
        (64, 64, 30.0, True, True, False),
        (100, 33, 0.2, True, True, False),
        (128, 300, 0.1, False, True, False),
        (4096 + 37, 64, 0.05, True, True, False),
        (4096 + 37, 520, -30.0, False, False, True),
        (1024, 96, 0.0, False, True, False),
    ],
)
def test_on_the_gpu(dtype, gate_dtype, length, channels, decay, packed, state, ranks) -> None:
    x, g, initial = (y.cuda() for y in make(2, length, channels, decay))
    ids = doc_ids(length).cuda() if packed else None
    inputs = [x.to(dtype), g.to(gate_dtype or dtype), initial]
    found = errors(over_ranks if ranks else segmented_hgrn, inputs, ids, state)
    assert all(error < TOLERANCE[dtype] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
def test_twice_the_same_bits() -> None:
    inputs = [y.cuda() for y in make(3, 9000, 600, 0.1)]
    inputs[:2] = [y.bfloat16() for y in inputs[:2]]
    first, second = (results(segmented_hgrn, inputs, None, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
