"""Mamba-2's state space dual on a GPU: simple GLA's kernels, called as this op calls them, against
the recurrence in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.mamba2 import state_space_dual
from fla_dist.kernels.mamba2.reference import state_space_dual_recurrent
from fla_dist.kernels.simple_gla import op as simple_gla
from tests.packing import doc_ids_of, positions_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


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
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return dict(zip(["y", "final", *inputs], [*outputs, *gradients], strict=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_kernels(size: int, width: int, groups: int, monkeypatch) -> None:
    monkeypatch.setattr(simple_gla, "_has_kernels", lambda *_: True)
    length = 1100
    inputs = {name: x.cuda() for name, x in make(length, width, size, groups).items()}
    positions = positions_of([0, 300, 301, length - 1], length)
    ids = doc_ids_of(torch.stack([positions, torch.arange(3, 3 + length)])).cuda()
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
