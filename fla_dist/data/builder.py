"""The background builder: worker processes that turn a plan's missing units into shards.

Every process that reads a cache has a Builder. On each host one of them, which holds the host's
lease, runs the workers; the others look for what they wait for. Hosts share the work by a lease a
unit: no unit is built by two, and when a builder dies, others take over what it had begun. A unit
that cannot be built leaves a failure beside the records, so that all the processes that wait for it
raise the same message; failures older than a process are tried again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fla_dist.data.cache import TokenCache
from fla_dist.data.errors import DataError
from fla_dist.data.lease import POLL_SECONDS, Lease
from fla_dist.data.tokenizer import Tokenizer
from fla_dist.data.units import Unit

logger = logging.getLogger(__name__)

LEASE_POLL_SECONDS = 0.5
PROGRESS_POLL_SECONDS = 0.2
BUILD_ATTEMPTS = 2  # a process may be killed for what it is not to blame for


class Closed(Exception):
    """The builder was closed while somebody waited for a unit."""


class Builder:
    """Builds the missing ones of `units`, first ones first, in a thread of its own.

    Args:
        units: gives the units in the order in which they will be needed; may be asked again.
        num_workers: processes, where this builder holds its host's lease.
        plan: names all of the units; builders of the same units give the same name.
    """

    def __init__(
        self,
        cache: TokenCache,
        tokenizer: Tokenizer,
        units: Callable[[], Iterable[Unit]],
        *,
        num_workers: int,
        plan: str,
    ):
        self._cache = cache
        self._tokenizer = tokenizer
        self._units = units
        self._pending: Iterator[Unit] = iter(units())
        self._others: deque[tuple[Unit, Lease]] = deque()  # units leased by others when met
        self._num_workers = num_workers
        self._plan = plan
        self._lease = Lease(cache.directory / "leases" / f"{plan}-{socket.gethostname()}")
        self._old_attempts = cache.failure_attempts()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failures: dict[Unit, str] = {}  # a full disk keeps none for the others
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._workers: list[Worker] = []

    def start(self) -> None:
        """Starts building, unless a builder has already seen every unit built."""
        if self._thread is None:
            complete = self._cache.is_complete(self._plan)
            self._start(lambda: None) if complete else self._start(self._run)

    def reorder(self) -> None:
        """Builds what is left in the order that `units` now gives."""
        with self._lock:
            self._pending = iter(self._units())

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
                self.rebuild(unit)  # it was there when a builder looked, and is gone
            time.sleep(POLL_SECONDS)

    def rebuild(self, unit: Unit) -> None:
        """Builds a unit now, for this process, unless another builds it.

        Raises:
            DataError: it cannot be built.
        """
        lease = self._cache.make_lease(unit)
        while not lease.try_acquire():
            if self._closed.wait(POLL_SECONDS):
                raise Closed
        try:
            if self._cache.is_built(unit):
                return
            worker = self._add_worker()
            message = worker.build(unit)
            worker.stop()
        finally:
            lease.release()
        if self._closed.is_set():
            raise Closed
        if message is not None:
            raise DataError(message)

    def build_all(self, on_progress: Callable[[int], None]) -> None:
        """Builds every unit now, calling back with the number of units looked after.

        Raises:
            DataError: naming each unit that cannot be built.
        """
        if self._thread is None:
            self._start(self._run)
        failures = []
        done = 0
        for done, unit in enumerate(self._units(), 1):
            while not self._cache.is_built(unit):
                message = self._failure(unit)
                if message is not None:
                    failures.append(message)
                    break
                if self._error is not None:
                    raise self._error
                time.sleep(PROGRESS_POLL_SECONDS)
            on_progress(done)
        if failures:
            raise DataError("\n".join(failures))

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for worker in self._workers:
                worker.stop()
        if self._thread is not None:
            self._thread.join()

    def _start(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="token-builder", daemon=True)
        self._thread.start()

    def _failure(self, unit: Unit) -> str | None:
        if unit in self._failures:
            return self._failures[unit]
        failure = self._cache.find_failure(unit)
        return failure.message if failure and failure.attempt not in self._old_attempts else None

    def _run(self) -> None:
        try:
            while not self._lease.try_acquire():
                if self._closed.wait(LEASE_POLL_SECONDS):
                    return
            try:
                self._cache.remove_leftovers()
                self._build_pending()
            finally:
                self._lease.release()
        except OSError as error:  # no lease can be written
            self._error = DataError(f"data.cache_dir: {self._cache.directory}: {error.strerror}")
        except BaseException as error:
            self._error = error  # wait_for raises it in the thread that needs the unit

    def _build_pending(self) -> None:
        # Plain daemon threads: those of concurrent.futures would hold up a failed run's exit.
        threads = [
            threading.Thread(target=self._feed_worker, name=f"token-builder-{i}", daemon=True)
            for i in range(self._num_workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not (self._failures or self._closed.is_set() or self._error):
            self._cache.mark_complete(self._plan)

    def _feed_worker(self) -> None:
        try:
            worker: Worker | None = None
            while (claim := self._claim()) is not None:
                unit, lease = claim
                try:
                    worker = worker or self._add_worker()
                    message = worker.build(unit)
                    if message is not None and not self._closed.is_set():
                        logger.error("%s", message)
                        self._cache.write_failure(unit, message)  # before anyone here raises it
                        self._failures[unit] = message
                finally:
                    lease.release()
                record = self._cache.find(unit)
                if record is not None and record.quarantined:
                    logger.warning("quarantined: %s", record.quarantined)
            if worker is not None:
                worker.stop()
        except OSError as error:
            self._error = DataError(f"data.cache_dir: {self._cache.directory}: {error.strerror}")
        except BaseException as error:
            self._error = error

    def _claim(self) -> tuple[Unit, Lease] | None:
        """Takes the first unit that is neither built nor known to fail nor another's."""
        while not self._closed.is_set():
            with self._lock:
                for unit in self._pending:
                    if self._closed.is_set():
                        return None
                    lease = self._cache.make_lease(unit)
                    if self._needs_building(unit):
                        if self._acquire(unit, lease):
                            return unit, lease
                        self._others.append((unit, lease))
                for _ in range(len(self._others)):
                    unit, lease = self._others.popleft()
                    if self._needs_building(unit):
                        if self._acquire(unit, lease):
                            return unit, lease
                        self._others.append((unit, lease))
                if not self._others:
                    return None
            self._closed.wait(LEASE_POLL_SECONDS)
        return None

    def _acquire(self, unit: Unit, lease: Lease) -> bool:
        if not lease.try_acquire():
            return False
        if self._needs_building(unit):
            return True
        lease.release()  # its builder ended between the two looks
        return False

    def _needs_building(self, unit: Unit) -> bool:
        if self._cache.is_built(unit):
            return False
        message = self._failure(unit)
        if message is not None:
            self._failures[unit] = message
        return message is None

    def _add_worker(self) -> Worker:
        worker = Worker(self._cache, self._tokenizer.path)
        with self._lock:
            self._workers.append(worker)
        return worker


class Worker:
    """A process that builds units one after another; started when first needed, and again if it
    dies."""

    def __init__(self, cache: TokenCache, tokenizer_path: Path):
        self._arguments = [str(cache.directory), str(tokenizer_path), cache.on_bad_source]
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
