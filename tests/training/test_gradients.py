"""Gradients summed over ranks while the backward goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fla_dist.training import gradients
from fla_dist.training.gradients import GradientSum
from tests.parallel.ranks import run_ranks


def sums(dtype: torch.dtype | None, device: str = "cpu") -> tuple[list[torch.Tensor], list[str]]:
    """Two steps of two backwards each; the second step's gradients, and what happened in it."""
    gradients.SMALL = 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model.to(device)
    unused = nn.Parameter(torch.zeros(5, device=device))
    events: list[str] = []
    last = False
    parameters = [unused, *model.parameters()]
    gradient_sum = GradientSum(parameters, lambda: last, dtype)
    reduce = dist.all_reduce

    def noted(x: torch.Tensor, **options: Any) -> Any:
        events.append(str(tuple(x.shape)))
        return reduce(x, **options)

    dist.all_reduce = noted
    for step in range(2):
        events.clear()
        for p in parameters:
            p.grad = None
        for last in (False, True):
            x = torch.full((1, 3), float(dist.get_rank() + 1 + step + 2 * last))
            model(x.to(device)).sum().backward()
            events.append("backward")
        gradient_sum.finish()
    dist.all_reduce = reduce
    return [p.grad.cpu() for p in parameters], events


def check_sums(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    for value in (2.0, 3.0, 4.0, 5.0):
        model(torch.full((1, 3), value)).sum().backward()
    expected = [torch.zeros(5), *(p.grad for p in model.parameters())]
    for found, events in run_ranks(2, sums, None, device, device=device):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
        # In the last backward, from the last layer to the first; then the rest.
        layers = ["(2, 3)", "(3, 3)", "(3, 3)"]
        assert events == ["backward", *layers, "backward", "(5,)", "(8,)"]


def test_gradients_of_several_backwards_are_summed() -> None:
    check_sums("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_gradients_of_several_backwards_are_summed_over_nccl() -> None:
    check_sums("cuda")


def test_gradients_are_sent_in_the_dtype_that_is_set() -> None:
    for found, _ in run_ranks(2, sums, torch.bfloat16):
        assert all(torch.equal(x, x.bfloat16().float()) for x in found)
