"""What ops compute while their states, or the gradients of these, are under way to other ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fla_dist.benchmark.compile_check import recording
from fla_dist.kernels.gla.op import SegmentedGLA
from fla_dist.kernels.gsa.op import SegmentedGSA
from fla_dist.kernels.simple_gla.op import SegmentedSimpleGLA
from fla_dist.kernels.state import LOCAL
from tests.kernels.test_recurrences import FAMILIES

TOKENS, HEADS, SIZE = 256, 2, 64


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(1, TOKENS, *shape, dtype=dtype, requires_grad=True)


class NotedScan:
    """Notes in `events` where scans start and are waited for."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def start(self, transition, state, initial, *, reverse_of=None) -> Any:
        direction = "forward" if reverse_of is None else "backward"
        self.events.append(f"{direction} starts")
        return NotedPending(transition, state, f"{direction} waits", self.events)


class NotedPending:
    def __init__(self, transition, state: Tensor, name: str, events: list[Any]) -> None:
        self.transition, self.state, self.name, self.events = transition, state, name, events

    def wait(self) -> tuple[Tensor, Tensor]:
        self.events.append(self.name)
        return LOCAL.start(self.transition, self.state, None).wait()


def simple_gla(scan: Any) -> tuple[Tensor, Tensor]:
    qkv = (empty(HEADS, SIZE) for _ in range(3))
    g = empty(HEADS, dtype=torch.float32)
    return SegmentedSimpleGLA.apply(*qkv, g, None, None, 1.0, scan)


def gla(scan: Any) -> tuple[Tensor, Tensor]:
    q, k, v, g = (empty(HEADS, SIZE) for _ in range(4))
    return SegmentedGLA.apply(q, k, v, g, None, None, None, 1.0, scan)


def gsa(scan: Any) -> tuple[Tensor, Tensor]:
    q, k, v, g = (empty(HEADS, SIZE) for _ in range(4))
    return SegmentedGSA.apply(q, k, v, g, None, None, 1.0, scan)


@pytest.mark.parametrize("family", [simple_gla, gla, gsa])
def test_kernels_run_between_start_and_wait(family: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
    with recording(90) as events:
        scan: Any = NotedScan(events)
        sum(y.float().sum() for y in family(scan)).backward()
    assert between(events, "backward")


class NotedOps(TorchDispatchMode):
    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.events.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_forms_compute_between_start_and_wait(family: str) -> None:
    """Decays to tokens at least, or scores; backward their gradients."""
    make, form, _, chunked = FAMILIES[family]
    events: list[Any] = []
    with NotedOps(events):
        inputs = [x.requires_grad_() for x in make(40, 0.5)]
        output, state = form(partial(chunked, scan=NotedScan(events)), *inputs, doc_ids=None)
        (output.sum() + state.sum()).backward()
    for direction in ("forward", "backward"):
        assert {"exp", "bmm", "mul"} & set(between(events, direction)), direction


def between(events: list[Any], direction: str) -> list[Any]:
    start, end = (events.index(f"{direction} {what}") for what in ("starts", "waits"))
    return events[start + 1 : end]
