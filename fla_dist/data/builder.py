"""The background builder: worker processes that turn a plan's missing units into shards.

Every process that reads a cache has a Builder, and whichever takes the lease runs the workers; the
others look for what they wait for. When the one that builds dies, another takes over with what is
still missing. A unit that cannot be built leaves a failure beside the records, so that all the
processes that wait for it raise the same message; failures older than a process are tried again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from fla_dist.data.cache import TokenCache
from fla_dist.data.errors import DataError
from fla_dist.data.lease import POLL_SECONDS, Lease
from fla_dist.data.sources import Unit
from fla_dist.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LEASE_POLL_SECONDS = 0.5
PROGRESS_POLL_SECONDS = 0.2
BUILD_ATTEMPTS = 2  # a process may be killed for what it is not to blame for


class Closed(Exception):
    """The builder was closed while somebody waited for a unit."""


class Builder:
    """Builds the missing ones of `units`, first ones first, in a thread of its own.

    Args:
        units: in the order in which they will be needed.
        num_workers: processes, where this builder holds the lease.
        plan: what the lease is for; builders of the same units give the same name.
    """

    def __init__(
        self,
        cache: TokenCache,
        tokenizer: Tokenizer,
        units: Iterable[Unit],
        *,
        num_workers: int,
        plan: str,
    ):
        self._cache = cache
        self._tokenizer = tokenizer
        self._units = list(units)
        self._pending = deque(self._units)
        self._num_workers = num_workers
        self._lease = Lease(cache.directory / "leases" / plan)
        self._old_attempts = cache.failure_attempts()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._workers: list[Worker] = []

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="token-builder", daemon=True)
            self._thread.start()

    def reorder(self, units: Iterable[Unit]) -> None:
        """Builds what is left in another order."""
        with self._lock:
            left = set(self._pending)
            self._pending = deque(unit for unit in units if unit in left)

    def wait_for(self, unit: Unit) -> None:
        """Returns when `unit` is built; some process or other builds it.

        Raises:
            DataError: it cannot be built; the same message in every process.
            Closed: close() was called.
        """
        self.start()
        assert self._thread is not None
        while not self._cache.is_built(unit):
            if self._closed.is_set():
                raise Closed
            message = self._failure(unit)
            if message is not None:
                raise DataError(message)
            if self._error is not None:
                raise self._error
            if not self._thread.is_alive() and not self._cache.is_built(unit):
                self.rebuild(unit)  # it was there when the thread looked, and is gone
            time.sleep(POLL_SECONDS)

    def rebuild(self, unit: Unit) -> None:
        """Builds a unit now, for this process; whoever else finds it damaged may do the same.

        Raises:
            DataError: it cannot be built.
        """
        worker = self._add_worker()
        message = worker.build(unit)
        worker.stop()
        if self._closed.is_set():
            raise Closed
        if message is not None:
            raise DataError(message)

    def build_all(self, on_progress: Callable[[int, int], None]) -> None:
        """Builds every unit now, calling back with (units looked after, units in all).

        Raises:
            DataError: naming each unit that cannot be built.
        """
        self.start()
        failures = []
        for done, unit in enumerate(self._units):
            on_progress(done, len(self._units))
            while not self._cache.is_built(unit):
                message = self._failure(unit)
                if message is not None:
                    failures.append(message)
                    break
                if self._error is not None:
                    raise self._error
                time.sleep(PROGRESS_POLL_SECONDS)
        on_progress(len(self._units), len(self._units))
        if failures:
            raise DataError("\n".join(failures))

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for worker in self._workers:
                worker.stop()
        if self._thread is not None:
            self._thread.join()

    def _failure(self, unit: Unit) -> str | None:
        failure = self._cache.find_failure(unit)
        return failure.message if failure and failure.attempt not in self._old_attempts else None

    def _next_pending(self) -> Unit | None:
        """Takes the first unit that is neither built nor known to fail."""
        with self._lock:
            while self._pending and not self._closed.is_set():
                unit = self._pending.popleft()
                if not self._cache.is_built(unit) and self._failure(unit) is None:
                    return unit
        return None

    def _run(self) -> None:
        try:
            while (unit := self._next_pending()) is not None:
                with self._lock:
                    self._pending.appendleft(unit)
                if not self._lease.try_acquire():
                    self._closed.wait(LEASE_POLL_SECONDS)
                    continue
                try:
                    self._cache.remove_leftovers()
                    self._build_pending()
                finally:
                    self._lease.release()
        except BaseException as error:
            self._error = error  # wait_for raises it in the thread that needs the unit

    def _build_pending(self) -> None:
        # Plain daemon threads: those of concurrent.futures would hold up a failed run's exit.
        threads = [
            threading.Thread(target=self._feed_worker, name=f"token-builder-{i}", daemon=True)
            for i in range(min(self._num_workers, len(self._pending)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _feed_worker(self) -> None:
        try:
            worker = self._add_worker()
            while (unit := self._next_pending()) is not None:
                message = worker.build(unit)
                if message is not None and not self._closed.is_set():
                    logger.error("%s", message)
                    self._cache.write_failure(unit, message)
            worker.stop()
        except BaseException as error:
            self._error = error

    def _add_worker(self) -> Worker:
        worker = Worker(self._cache.directory, self._tokenizer.path)
        with self._lock:
            self._workers.append(worker)
        return worker


class Worker:
    """A process that builds units one after another; started when first needed, and again if it
    dies."""

    def __init__(self, cache_directory: Path, tokenizer_path: Path):
        self._arguments = [str(cache_directory), str(tokenizer_path)]
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # so that none is started after stop()
        self._stopped = False

    def build(self, unit: Unit) -> str | None:
        """What is wrong with the unit, or None when it is built."""
        for _ in range(BUILD_ATTEMPTS):
            with self._lock:
                if self._stopped:
                    return "the builder is closed"
                if self._process is None:
                    self._process = self._start()
                process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(unit.to_json()) + "\n")
                process.stdin.flush()
                result = process.stdout.readline()
            except BrokenPipeError:
                result = ""
            if result:
                return json.loads(result)
            self._process = None
        return (
            f"{unit.key}: {unit.pieces[0].path}: the builder process ended with status "
            f"{process.wait()} (a negative one is a signal; -9 often means too little memory)"
        )

    def stop(self) -> None:
        """Ends the process, amid a unit if need be: nothing half built is ever seen."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fla_dist.data.build_worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                # tokenizers' threads do not survive a fork, and one core a worker is what is asked
                "RAYON_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
            },
        )
