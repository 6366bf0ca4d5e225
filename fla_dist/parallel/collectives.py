"""Collectives on flat tensors, whose names differ between releases of PyTorch, and exchanges made
of several of them."""

from __future__ import annotations

from collections.abc import Generator
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from fla_dist.parallel.slices import Slices

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_to_all = dist.all_to_all_single

Steps: TypeAlias = Generator["list[Work]", None, Tensor]
"""An exchange as a generator: yields the collectives that it started and needs ended before it can
go on; returns what it received."""


def send_and_receive(
    sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: ProcessGroup | None
) -> list[Work]:
    """Point to point, all at once: (tensor, rank in the world) each."""
    operations = [dist.P2POp(dist.isend, x, peer, group=group) for x, peer in sends]
    operations += [dist.P2POp(dist.irecv, x, peer, group=group) for x, peer in receives]
    return dist.batch_isend_irecv(operations) if operations else []


class Transfer:
    """An exchange under way.

    On a GPU all its steps are issued at once on a stream of their own, where they wait for each
    other; the host waits for none. On a CPU the first collective runs while the caller works, and
    `wait` does the rest.
    """

    def __init__(self, steps: Steps, slices: Slices, phase: str, device: torch.device) -> None:
        self._steps, self._slices, self._phase = steps, slices, phase
        self._works: list[Work] = []
        self._result: Any = None
        self._stream = _side_stream(device) if device.type == "cuda" else None
        slices.begin(phase)
        if self._stream is None:
            self._advance()
            return
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            while self._advance():
                pass
            self._ended = self._stream.record_event()

    def wait(self) -> Tensor:
        """What was received. Called once."""
        with self._slices.exposed():
            if self._stream is None:
                while self._advance():
                    pass
            else:
                here = torch.cuda.current_stream(self._result.device)
                here.wait_event(self._ended)
                self._result.record_stream(here)
        result, self._result = self._result, None
        return result

    def _advance(self) -> bool:
        """Ends what is under way and starts what follows; False when nothing does."""
        if self._result is not None:
            return False
        with self._slices.naming(self._phase):
            for work in self._works:
                work.wait()
            try:
                self._works = next(self._steps)
            except StopIteration as end:
                self._works, self._result = [], end.value
                return False
        self._slices.watch(self._phase, self._works)
        return True


def exchange(steps: Steps, slices: Slices, phase: str) -> Tensor:
    """Runs an exchange to its end."""
    works: list[Work] = []
    slices.begin(phase)
    with slices.exposed(), slices.naming(phase):
        while True:
            for work in works:
                work.wait()
            try:
                works = next(steps)
            except StopIteration as end:
                return end.value
            slices.watch(phase, works)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
