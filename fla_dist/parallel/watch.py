"""Which rank is to blame when an exchange does not end.

Every rank tells the store of the process group, once a second, how many exchanges it has begun and
which was the last. Where a collective fails, or does not end in time, the ranks that fell silent
and those that are behind are named. A thread does so: NCCL's collectives fail in no call of ours.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, Work

EXIT_EXCHANGE_FAILED = 1


class ExchangeError(RuntimeError):
    """An exchange with other ranks failed; the message names ranks, layer and phase."""


@dataclass(frozen=True)
class _Progress:
    """What a rank tells: `begun` exchanges, the last of them `label`."""

    beat: int = 0
    begun: int = 0
    label: str = "none"
    waits_in_vain: bool = False


@dataclass(frozen=True)
class _InFlight:
    began: float
    label: str
    ranks: Sequence[int]
    work: Work


class Watch(threading.Thread):
    """The beat of one rank, and its eye on the others."""

    def __init__(
        self, store: Store, rank: int, *, timeout_seconds: float, interval_seconds: float = 1.0
    ) -> None:
        super().__init__(name="exchange watch", daemon=True)
        connection: Any = store  # typed without `clone`
        self._store: Store = connection.clone()  # the main thread may be waiting in its own
        self._rank = rank
        self._timeout, self._interval = timeout_seconds, interval_seconds
        self._ended = threading.Event()
        self._beat = self._begun = 0
        self._label = "none"
        self._waits_in_vain = False
        self._in_flight: deque[_InFlight] = deque()

    def begin(self, label: str) -> None:
        self._begun += 1
        self._label = label

    def add(self, label: str, ranks: Sequence[int], work: Work) -> None:
        self._in_flight.append(_InFlight(time.monotonic(), label, ranks, work))

    def run(self) -> None:
        while not self._ended.wait(self._interval):
            self._tell()
            while self._in_flight and self._in_flight[0].work.is_completed():
                self._in_flight.popleft()
            if not self._in_flight:
                continue
            oldest = self._in_flight[0]
            if time.monotonic() - oldest.began > self._timeout:
                reason = f"not ended within {self._timeout:g} s"
                text = self.explain(oldest.label, oldest.ranks, reason)
                print(f"error: {text}", file=sys.stderr, flush=True)
                os._exit(EXIT_EXCHANGE_FAILED)

    def end(self) -> None:
        self._ended.set()
        self.join()

    def explain(self, label: str, ranks: Sequence[int], reason: str) -> str:
        """What is known of a failed exchange; takes three beats, to tell the silent from the
        slow."""
        self._waits_in_vain = True
        others = [rank for rank in ranks if rank != self._rank]
        try:
            self._tell()
            before = {rank: self._read(rank) for rank in others}
            time.sleep(3 * self._interval)
            after = {rank: self._read(rank) for rank in others}
        except RuntimeError:
            blame = ["the store of the process group is gone too (rank 0, or the launcher)"]
        else:
            blame = []
            for rank, seen in after.items():
                if not seen.waits_in_vain and seen == before[rank]:
                    blame.append(f"rank {rank} is silent, last in {seen.label}")
                elif not seen.waits_in_vain and seen.begun < self._begun:
                    blame.append(f"rank {rank} is behind, last in {seen.label}")
        return f"rank {self._rank}: {label}: {reason}: {'; '.join(blame) or 'all ranks are alive'}"

    def _tell(self) -> None:
        self._beat += 1
        mine = _Progress(self._beat, self._begun, self._label, self._waits_in_vain)
        with suppress(RuntimeError):  # a store that is gone is found where a rank is to blame
            self._store.set(self._key(self._rank), json.dumps(astuple(mine)))

    def _read(self, rank: int) -> _Progress:
        key = self._key(rank)
        if not self._store.check([key]):
            return _Progress()
        return _Progress(*json.loads(self._store.get(key)))

    @staticmethod
    def _key(rank: int) -> str:
        return f"exchange_watch/{rank}"


_watch: Watch | None = None


@contextmanager
def watching(timeout_seconds: float, interval_seconds: float = 1.0) -> Iterator[None]:
    """Watches the exchanges of this process; torch.distributed must be initialized."""
    global _watch
    store = dist.distributed_c10d._get_default_store()
    _watch = Watch(
        store, dist.get_rank(), timeout_seconds=timeout_seconds, interval_seconds=interval_seconds
    )
    _watch.start()
    try:
        yield
    finally:
        _watch.end()
        _watch = None


def current_watch() -> Watch | None:
    return _watch


@contextmanager
def explained(label: str, ranks: Sequence[int]) -> Iterator[None]:
    """Turns what a collective among `ranks` raises into an ExchangeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ExchangeError | torch.OutOfMemoryError):
            raise
        reason = str(error).split(". ")[0]
        if _watch is None:
            raise ExchangeError(f"rank {dist.get_rank()}: {label}: {reason}") from error
        raise ExchangeError(_watch.explain(label, ranks, reason)) from error
