"""What sequence parallelism sends, and how long that takes: counted on the model itself.

A model on the meta device runs a slice with `CountingExchange`, which receives what each mixer asks
of other ranks, sends nothing, and notes its size. So no family tells its bytes anywhere.

A collective over P ranks that brings a rank n bytes is taken to last α + n / B.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.state import Pending, Scan, Transition
from fla_dist.parallel.attention import GATHERED_BYTES, Masks, choose
from fla_dist.parallel.halo import Arrived, behind
from fla_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Link:
    """One collective: seconds until the first byte, and bytes a second that a rank receives."""

    alpha_seconds: float
    bytes_per_second: float

    def seconds(self, received_bytes: float) -> float:
        return self.alpha_seconds + received_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Links:
    """Among the ranks of a host, and from host to host."""

    host: Link = Link(25e-6, 309e9)
    """All-gathers of 4 and 16 MiB a rank over 4 GPUs on NVLink: 66 and 188 µs (NCCL 2.28)."""
    hosts: Link = Link(30e-6, 45e9)
    """Assumed: InfiniBand of 400 Gbit/s a GPU."""


def read_links(path: str | Path) -> Links:
    """What `launch/benchmark.py links` measured; the default for a kind that it could not.

    Raises:
        ValueError: the file cannot be read, or is not one of its results.
    """
    try:
        fits = json.loads(Path(path).read_text())["links"]
        return Links(**{kind: Link(**fit) for kind, fit in fits.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"links {path}: not a result of launch/benchmark.py links: {error}"
        ) from error


@dataclass(frozen=True)
class Cost:
    """Of some exchanges: bytes that a rank receives, and seconds if nothing overlaps."""

    received_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.received_bytes + other.received_bytes, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.received_bytes * times, self.seconds * times)


class CountingExchange:
    """The exchange of the last rank of a sequence, who receives the most, as sizes only.

    Attributes:
        costs: of a forward and its backward, by what is sent.
    """

    def __init__(self, mesh: Mesh, links: Links, element_size: int) -> None:
        self.scan: Scan = self
        self.costs: dict[str, Cost] = {}
        self._mesh, self._links, self._element_size = mesh, links, element_size
        self._link = links.hosts if mesh.spans_hosts else links.host

    def before(self, x: Tensor, width: int) -> Arrived:
        halo = x.new_empty(x.shape[0], width, *x.shape[2:])
        there = (self._mesh.sequence_parallel_size - 1) * x.shape[1]
        size = halo[:, :there].numel() * self._element_size
        self._add("halos", 2 * size, 2 * self._link.seconds(size))
        return Arrived(halo)

    def with_halo(self, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        return behind(self.before(torch.stack(xs, dim=2), width).wait(), xs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        parts: list[float]
        size, others = self._mesh.sequence_parallel_size, self._mesh.sequence_parallel_size - 1
        name = choose(self._mesh, q.shape[2], k.shape[2], q.shape[1])
        keys = 2.0 * k.numel() * self._element_size  # and values
        if name == "all_to_all":
            # q and o, then q, o, do and dq; k and v, then k, v, dk and dv.
            sizes = [q.numel()] * 6 + [k.numel()] * 6
            parts = [n * self._element_size * others / size for n in sizes]
        elif name == "ring":
            parts = [keys] * (3 * others)
        else:
            gradients = 2.0 * k.numel() * 4
            groups = min(k.shape[2], math.ceil(keys * size / GATHERED_BYTES))
            parts = [keys * others / groups] * (2 * groups) + [gradients * others / groups] * groups
        self._add("keys and values", sum(parts), sum(map(self._link.seconds, parts)))
        return torch.empty_like(q)

    def prepare_attention(self, heads: int, kv_heads: int, masks: Masks) -> None:
        pass

    def of_layer(self, index: int) -> CountingExchange:
        return self

    def of_lengths(self, lengths: tuple[int, ...] | None) -> CountingExchange:
        return self

    def tokens_before(self, length: int) -> int:
        """More than any window: where a mask must ask whether the window covers all that there is,
        it looks at positions, which have no values here."""
        return 1 << 40

    def start(
        self,
        transition: Transition,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> _CountedScan:
        added = 4 * state[:, 0].numel()
        passed = 4 * transition.sent[:, 0].numel()
        for size in (added + passed, added):  # the reverse sends no transition
            self._states(size)
        return _CountedScan(transition, state)

    def _states(self, size: int) -> None:
        mesh, links = self._mesh, self._links
        if mesh.state_exchange == "all_gather":
            received = (mesh.sequence_parallel_size - 1) * size
            self._add("states", received, self._link.seconds(received))
            return
        local = mesh.ranks_per_host
        inside = size * (local - 1) / local
        across = (mesh.sequence_parallel_size // local - 1) * size / local
        seconds = 2 * links.host.seconds(inside) + links.hosts.seconds(across)
        self._add("states", 2 * inside + across, seconds)

    def _add(self, what: str, received_bytes: float, seconds: float) -> None:
        self.costs[what] = self.costs.get(what, Cost()) + Cost(received_bytes, seconds)


class _CountedScan:
    def __init__(self, transition: Transition, state: Tensor) -> None:
        self.transition = transition
        self._state: Any = state

    def wait(self) -> tuple[Tensor, Tensor]:
        state, self._state = self._state, None
        return torch.zeros_like(state), torch.zeros_like(state[:, 0])
