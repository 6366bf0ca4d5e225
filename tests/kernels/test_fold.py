"""The fold by kernels against the fold in PyTorch, for the shapes that scans over ranks give it."""

from __future__ import annotations

import pytest
import torch

from fla_dist.kernels.common.fold import compose_by_kernel, fold_by_kernel
from fla_dist.kernels.state import RESET, Dense, Diagonal, Transition, fold
from tests.kernels.interpreter import interpreted, run_interpreted


def cases() -> dict[str, tuple[Transition, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    decay = -random(2, 5, 3, 4, 1).square()
    decay[:, 2] = RESET
    return {
        "decays of keys": (Diagonal(decay), random(2, 5, 3, 4, 6)),
        "decays of heads": (Diagonal(-random(2, 5, 3, 1, 1).square()), random(2, 5, 3, 4, 6)),
        "channels with a rate": (
            Diagonal(random(2, 5, 7, 1).square(), -random(7, 4).square()), random(2, 5, 7, 4)
        ),
        "numbers": (Diagonal(-random(2, 5, 7).square()), random(2, 5, 7)),
        "rows": (Diagonal(-random(1, 4, 6, 1).square()), random(1, 4, 6, 5)),
        "dense": (Dense(random(2, 5, 3, 4, 4) / 2), random(2, 5, 3, 4, 6)),
    }  # fmt: skip


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", cases())
def test_it_equals_the_fold_in_pytorch(name: str, reverse: bool) -> None:
    transition, state = cases()[name]
    entering = torch.randn(state[:, 0].shape, generator=torch.Generator().manual_seed(1))
    expected = fold(transition, state, entering, reverse=reverse)
    for got, truth in zip(
        fold_by_kernel(transition, state, entering, reverse=reverse), expected, strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


@interpreted
def test_stretches_composed() -> None:
    transition, _ = cases()["dense"]
    assert isinstance(transition, Dense)
    expected = transition.total().matrix
    torch.testing.assert_close(compose_by_kernel(transition).matrix, expected, rtol=0, atol=1e-5)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)
