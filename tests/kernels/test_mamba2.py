"""Mamba-2's state space dual by its kernels, on a GPU and in Triton's interpreter, against
the recurrence in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.mamba2 import op, state_space_dual, steps
from fla_dist.kernels.mamba2.reference import state_space_dual_recurrent
from fla_dist.kernels.mamba2.settings import Settings
from tests.kernels.interpreter import interpreted, run_interpreted
from tests.packing import doc_ids_of, positions_of


def make(length: int, width: int, size: int, groups: int) -> dict[str, Tensor]:
    """Four heads of `width` numbers, states of `size`."""
    generator = torch.Generator().manual_seed(length + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(2, length, 4, width),
        "dt": normal(2, length, 4),
        "A": -torch.rand(4, generator=generator) - 0.1,
        "B": normal(2, length, groups, size),
        "C": normal(2, length, groups, size),
        "dt_bias": torch.full((4,), -3.0),
        "D": normal(4),
        "initial_state": normal(2, 4, size, width),
    }


def results(function, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    others = {name: inputs[name] for name in ("dt_bias", "D", "initial_state")}
    outputs = function(*(inputs[n] for n in ("x", "dt", "A", "B", "C")), **others, doc_ids=ids)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return dict(zip(["y", "final", *inputs], [*outputs, *gradients], strict=True))


def documents(length: int) -> Tensor:
    """One row of documents that start here and there, one that is the middle of a document."""
    positions = positions_of([0, length // 4, length // 4 + 1, length - 1], length)
    return doc_ids_of(torch.stack([positions, torch.arange(3, 3 + length)]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_kernels(size: int, width: int, groups: int, monkeypatch) -> None:
    monkeypatch.setattr(op, "has_kernels", lambda *_: True)
    length = 1100
    inputs = {name: x.cuda() for name, x in make(length, width, size, groups).items()}
    ids = documents(length).cuda()
    exact = {
        name: x.bfloat16().double() if name in ("x", "dt", "B", "C") else x.double()
        for name, x in inputs.items()
    }
    halved = {
        name: x.bfloat16() if name in ("x", "dt", "B", "C") else x for name, x in inputs.items()
    }
    got = results(state_space_dual, halved, ids)
    for name, truth in results(state_space_dual_recurrent, exact, ids).items():
        assert (got[name].double() - truth).norm() <= 5e-3 * truth.norm(), name


@interpreted
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 2)])
def test_interpreter_matches_recurrence(heads: int, groups: int, monkeypatch) -> None:
    launch = Launch(16 * heads, 4, 1)
    chosen = Settings(16, *[launch] * 5, heads=heads, together=(1, 8), programs=10**9, longest=32)
    monkeypatch.setattr(op, "has_kernels", lambda *_: True)
    monkeypatch.setattr(steps, "settings", lambda *_: chosen)
    inputs, ids = make(75, 24, 20, groups), documents(75)
    got = results(state_space_dual, inputs, ids)
    exact = {name: x.double() for name, x in inputs.items()}
    for name, truth in results(state_space_dual_recurrent, exact, ids).items():
        assert (got[name].double() - truth).norm() <= 1e-5 * truth.norm(), name


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)
