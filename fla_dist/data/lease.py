"""A file that one process holds.

The file appears whole by a link and names its holder. A holder on this host is dead when its
process is; one on another host when its heartbeat stood still for STALE_SECONDS of the *observer's*
clock, so no two clocks are ever compared. Two holders at once, which a suspended machine can bring
about, waste work and do no harm: what is built is named by its content and renamed into place.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.05


class Lease:
    """At most one live holder of `path`; make one object a process and keep it while waiting."""

    def __init__(self, path: Path):
        self._path = path
        self._token = uuid.uuid4().hex
        self._stop: threading.Event | None = None
        self._heartbeat: threading.Thread | None = None
        self._seen: tuple[str, float, float] | None = None  # content, mtime, since when (ours)

    def try_acquire(self) -> bool:
        """Takes the lease if it is free or its holder is dead; never waits."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_free():
            return False
        # Written beside and linked: the lease appears with its content or not at all.
        temporary = self._path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{self._token}")
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "token": self._token,
        }
        temporary.write_text(json.dumps(holder))
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(
            target=self._beat, args=(self._stop,), name="lease-heartbeat", daemon=True
        )
        self._heartbeat.start()
        return True

    def release(self) -> None:
        if self._stop is None or self._heartbeat is None:
            return
        self._stop.set()
        self._heartbeat.join()
        self._stop = self._heartbeat = None
        holder = self._read()
        if holder and json.loads(holder[0])["token"] == self._token:
            self._path.unlink(missing_ok=True)

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _read(self) -> tuple[str, float] | None:
        try:
            return self._path.read_text(), self._path.stat().st_mtime
        except OSError:
            return None

    def _is_free(self) -> bool:
        """Whether nobody holds it; takes it away from a dead holder."""
        found = self._read()
        if found is None:
            return True
        content, mtime = found
        if self._seen is None or self._seen[:2] != found:
            self._seen = (content, mtime, time.monotonic())
        stands_still = time.monotonic() - self._seen[2] > STALE_SECONDS
        try:
            holder = json.loads(content)
            host, pid, started = holder["host"], holder["pid"], holder["started"]
            dead = host == socket.gethostname() and _process_start(pid) != started
        except (ValueError, KeyError, TypeError):
            dead = True  # a damaged lease holds nobody
        if not dead and not stands_still:
            return False
        # A rename has one winner among the processes that found the lease stale.
        aside = self._path.with_name(f".stale-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            aside.unlink()
        return True


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Waits for the lease, holds it."""
    lease = Lease(path)
    while not lease.try_acquire():
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lease.release()


def _process_start(pid: int) -> str | None:
    """What tells a process from a later one of the same id; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:  # no /proc, as on macOS: the id alone must do
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
