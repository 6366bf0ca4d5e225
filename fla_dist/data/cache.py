"""Which unit is in which shard.

    units/<name>.json     a unit's record: its shard, its text's sha256, token and document counts
    shards/<name>.tokens  a shard, named by a hash of its text, the tokenizer and the format
    failures/<name>.json  why a unit could not be built, for the processes that wait for it
    leases/<name>         who builds a unit now
    complete/<plan>       all units of a plan were built when a builder looked
    plans/, tokenizers/   how files were cut into units; tokenizers by content

A unit's name is a hash of its files' paths, sizes and times: known without reading them, and a new
one as soon as they change. A shard's name is a hash of what is in it, so files that were moved or
touched are read again but not encoded again, and nothing stale is ever used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fla_dist.data.documents import hash_documents, read_documents
from fla_dist.data.errors import DamagedShardError, DataError
from fla_dist.data.lease import Lease
from fla_dist.data.shard import Shard, write_atomically, write_shard
from fla_dist.data.tokenizer import Tokenizer
from fla_dist.data.units import Unit

FORMAT_VERSION = 2


@dataclass(frozen=True)
class UnitRecord:
    """Attributes:
    quarantined: why the unit's text could not be read, in place of which its shard is empty.
    """

    shard: str
    source_sha256: str
    tokens: int
    documents: int
    quarantined: str = ""


@dataclass(frozen=True)
class Failure:
    attempt: str
    message: str


class TokenCache:
    """The shards of one tokenizer in a directory that any number of processes share.

    Args:
        on_bad_source: "error", or "quarantine": an empty shard for a unit that cannot be read.
    """

    def __init__(self, directory: Path, tokenizer_sha256: str, on_bad_source: str = "error"):
        self.directory = directory
        self.tokenizer_sha256 = tokenizer_sha256
        self.on_bad_source = on_bad_source

    def unit_name(self, unit: Unit) -> str:
        return _hash(FORMAT_VERSION, self.tokenizer_sha256, unit.identity())

    def find(self, unit: Unit) -> UnitRecord | None:
        """The record of a unit that is built; a damaged record is none."""
        try:
            record = json.loads(self._record_path(unit).read_text())
            fields = record["record"]
            if record["check"] != _hash(fields):
                return None
            found = UnitRecord(**fields)
            accepted = self.on_bad_source == "quarantine" or not found.quarantined
            return found if accepted else None
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None

    def is_built(self, unit: Unit) -> bool:
        record = self.find(unit)
        return record is not None and self._shard_path(record).exists()

    def open(self, unit: Unit) -> Shard:
        """The shard of a unit that is built.

        Raises:
            DamagedShardError: it is missing, damaged, or not the one that its record tells of.
        """
        record = self.find(unit)
        if record is None:
            raise DamagedShardError(f"{self._record_path(unit)}: missing or damaged")
        path = self._shard_path(record)
        try:
            shard = Shard(path)
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path}: missing") from error
        header = shard.header
        if (header.tokens, header.source_sha256) != (record.tokens, record.source_sha256):
            raise DamagedShardError(f"{path}: not the shard that its record tells of")
        return shard

    def build(self, unit: Unit, tokenizer: Tokenizer) -> None:
        """Reads and encodes a unit; both files are whole and durable, or not there.

        Raises:
            DataError: the source cannot be used, or is not what was encoded before, or the cache
                cannot be written.
        """
        before = self.find(unit)
        documents, quarantined = self._read(unit)
        sha256 = hash_documents(documents)
        if before is not None and before.source_sha256 != sha256:
            raise DataError(
                f"{unit.key}: {unit.pieces[0].path}: its text is not what was encoded before, "
                f"though its size and time are: {quarantined or 'the file is damaged'}; restore "
                f"it, or remove {self._record_path(unit)} to take it as it is"
            )
        self.store(
            unit,
            tokenizer,
            sha256,
            lambda: tokenizer.encode_documents(documents),
            quarantined,
        )

    def store(
        self,
        unit: Unit,
        tokenizer: Tokenizer,
        sha256: str,
        encode: Callable[[], Sequence[np.ndarray]],
        quarantined: str = "",
    ) -> None:
        """Writes a unit's shard, unless there is one of the same text, and its record.

        Args:
            sha256: of the text.
            encode: gives the documents' tokens.
        """
        name = _hash(FORMAT_VERSION, sha256, tokenizer.sha256, tokenizer.dtype) + ".tokens"
        path = self.directory / "shards" / name
        try:
            for folder in ("shards", "units", "failures"):
                (self.directory / folder).mkdir(parents=True, exist_ok=True)
            try:
                shard = Shard(path)
                shard.verify()
            except (FileNotFoundError, DamagedShardError):
                write_shard(
                    path,
                    encode(),
                    dtype=tokenizer.dtype,
                    source_sha256=sha256,
                    tokenizer_sha256=tokenizer.sha256,
                )
                shard = Shard(path)
            header = shard.header
            record = asdict(UnitRecord(name, sha256, header.tokens, header.documents, quarantined))
            text = json.dumps({"record": record, "check": _hash(record)})
            write_atomically(self._record_path(unit), [text.encode()])
        except OSError as error:
            raise DataError(f"data.cache_dir: {self.directory}: {error.strerror}") from error
        except DamagedShardError as error:
            raise DataError(f"data.cache_dir: {error} right after it was written") from error

    def _read(self, unit: Unit) -> tuple[list[str], str]:
        """(documents, why they are none)."""
        try:
            return read_documents(unit), ""
        except DataError as error:
            if self.on_bad_source == "quarantine" and not _may_pass(error.__cause__, unit):
                return [], str(error)
            raise

    def make_lease(self, unit: Unit) -> Lease:
        """What its builder holds while it builds the unit."""
        return Lease(self.directory / "leases" / self.unit_name(unit))

    def is_complete(self, plan: str) -> bool:
        return self._complete_path(plan).exists()

    def mark_complete(self, plan: str) -> None:
        path = self._complete_path(plan)
        with contextlib.suppress(OSError):  # it only saves the next run a look at every unit
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def discard_if_damaged(self, unit: Unit) -> None:
        """Removes a unit's shard if a read of the whole of it confirms the damage.

        It may already have been rebuilt by the time that this process saw the damage. The record
        stays, for what is rebuilt must be of the same text.
        """
        record = self.find(unit)
        try:
            self.open(unit).verify()
        except DamagedShardError:
            if record is not None:
                self._shard_path(record).unlink(missing_ok=True)

    def verify(self, unit: Unit) -> None:
        """Checks every byte of a unit's shard.

        Raises:
            DamagedShardError.
        """
        self.open(unit).verify()

    def write_failure(self, unit: Unit, message: str) -> None:
        failure = json.dumps(asdict(Failure(uuid.uuid4().hex, message)))
        with contextlib.suppress(OSError):  # with a full disk, the others find out by themselves
            self._failure_path(unit).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._failure_path(unit), [failure.encode()])

    def find_failure(self, unit: Unit) -> Failure | None:
        return _read_failure(self._failure_path(unit))

    def failure_attempts(self) -> set[str]:
        """The attempts that have failed so far, of whatever unit."""
        failures = (_read_failure(p) for p in (self.directory / "failures").glob("*.json"))
        return {failure.attempt for failure in failures if failure is not None}

    def remove_leftovers(self) -> None:
        """Removes the temporary files of this host's dead builders."""
        prefix = f".tmp-{socket.gethostname()}-"
        for folder in ("shards", "units", "failures", "leases", "plans"):
            for path in (self.directory / folder).glob(f"{prefix}*"):
                pid = path.name.removeprefix(prefix).split("-")[0]
                if not _is_alive(int(pid)):
                    path.unlink(missing_ok=True)

    def _record_path(self, unit: Unit) -> Path:
        return self.directory / "units" / f"{self.unit_name(unit)}.json"

    def _failure_path(self, unit: Unit) -> Path:
        return self.directory / "failures" / f"{self.unit_name(unit)}.json"

    def _complete_path(self, plan: str) -> Path:
        return self.directory / "complete" / f"{plan}-{self.on_bad_source}"

    def _shard_path(self, record: UnitRecord) -> Path:
        return self.directory / "shards" / record.shard


def _read_failure(path: Path) -> Failure | None:
    try:
        return Failure(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _may_pass(cause: BaseException | None, unit: Unit) -> bool:
    """Whether a read that failed may succeed another time: a unit must not depend on when it was
    built."""
    if unit.format == "hub":  # the errors of the network are of many kinds
        return cause is not None and (
            isinstance(cause, OSError) or not isinstance(cause, ValueError)
        )
    passing = isinstance(cause, OSError) and cause.errno is not None
    return passing and not isinstance(cause, FileNotFoundError)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
