"""Files → units of text, and the documents of one unit.

A unit is what one builder task reads and one shard holds: whole small files, a byte range of a
large one, or row groups of a parquet file. Units are found from directory listings, sizes and
parquet footers alone, so a plan over terabytes is made without reading their text.

Text and jsonl are read line by line here and not through `datasets`: its readers name neither the
file's line nor the byte of a bad input, and take no byte range. Parquet is read by pyarrow, which
`datasets` would call, for the same reason: it takes row groups and keeps row numbers.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.lib
import pyarrow.parquet as pq

from fla_dist.config import SourceConfig
from fla_dist.data.errors import DataError

LARGEST_UNIT_BYTES = 32 << 20
SMALLEST_UNIT_BYTES = 64 << 10
UNITS_OF_A_SMALL_SOURCE = 32  # so that training can start on its first ones, and lanes differ

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
TEST_DIRECTORIES = {"test", "tests", "idle_test"}
NOT_SOURCE_DIRECTORIES = {"__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Piece:
    """A file's bytes [start, stop), or for parquet its row groups, as the file was when planned."""

    path: str
    name: str
    size: int
    mtime_ns: int
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """The text that one shard is built from.

    Attributes:
        key: the config key of its source, for messages.
        format: text (a file, or a range of one, is a document), jsonl, parquet or python-docs.
    """

    key: str
    format: str
    text_field: str
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Unit:
        return Unit(**{**value, "pieces": tuple(Piece(**piece) for piece in value["pieces"])})

    def identity(self, *, moved: bool) -> list[Any]:
        """What makes two units the same; with `moved`, wherever and whenever the files were put."""
        pieces = [
            [p.name, p.size, p.start, p.stop]
            if moved
            else [p.path, p.size, p.mtime_ns, p.start, p.stop]
            for p in self.pieces
        ]
        return [self.format, self.text_field, pieces]


@dataclass(frozen=True)
class Source:
    """One entry of the config's sources, resolved.

    Attributes:
        key: as in `data.sources.0`.
    """

    key: str
    weight: float
    units: tuple[Unit, ...]


def resolve_sources(configs: Iterable[SourceConfig], key: str) -> list[Source]:
    """Finds the files of every source; `key` is the config key of the list."""
    return [_resolve(config, f"{key}.{i}") for i, config in enumerate(configs)]


def _resolve(config: SourceConfig, key: str) -> Source:
    scheme, _, rest = config.path.partition(":")
    if scheme == "python-docs":
        spec = importlib.util.find_spec("pydoc_data.topics")
        if rest or spec is None or spec.origin is None:
            raise DataError(f"{key}.path: {config.path}: this Python has no such documents")
        files = [(spec.origin, "topics.py", "python-docs")]
    elif scheme == "python-source":
        files = [(path, name, "text") for path, name in _python_source(rest, config.path, key)]
    else:
        files = _find_files(config, key)
    units = _divide(files, config.text_field, key)
    if not units:
        raise DataError(f"{key}.path: {config.path}: no file there has text")
    return Source(key, config.weight, tuple(units))


def _python_source(package: str, path: str, key: str) -> list[tuple[str, str]]:
    """Python files of the standard library, or of an installed package, without tests."""
    if package:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"{key}.path: {path}: no package {package!r} is installed")
        root = spec.submodule_search_locations[0]
    else:
        root = sysconfig.get_paths()["stdlib"]
    found = []
    for directory, children, names in os.walk(root):
        children[:] = sorted(set(children) - TEST_DIRECTORIES - NOT_SOURCE_DIRECTORIES)
        for name in sorted(names):
            full = os.path.join(directory, name)
            if name.endswith(".py") and os.path.getsize(full):
                found.append((full, os.path.relpath(full, root)))
    return found


def _find_files(config: SourceConfig, key: str) -> list[tuple[str, str, str]]:
    """(path, name within the source, format) of each file, sorted by name."""
    path = os.path.expanduser(config.path)
    if os.path.isdir(path):
        root = path
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        paths = [p for p in paths if not any(s[0] == "." for s in Path(p).relative_to(root).parts)]
        if config.format == "auto":
            paths = [p for p in paths if Path(p).suffix in SUFFIXES]
        what = "the directory holds no " + (
            " ".join(SUFFIXES) if config.format == "auto" else "file"
        )
    elif os.path.exists(path):
        root, paths, what = os.path.dirname(path), [path], ""
    else:
        paths = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        root = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
        what = "no file matches" if glob.has_magic(path) else "no such file"
    if not paths:
        raise DataError(f"{key}.path: {config.path}: {what}")
    files = []
    for file in paths:
        kind = SUFFIXES.get(Path(file).suffix) if config.format == "auto" else config.format
        if kind is None:
            raise DataError(
                f"{key}.format: 'auto' knows {' '.join(SUFFIXES)}, not {file}; "
                "set text, jsonl or parquet"
            )
        files.append((os.path.abspath(file), os.path.relpath(file, root or "."), kind))
    return sorted(files, key=lambda file: file[1])


def _divide(files: list[tuple[str, str, str]], text_field: str, key: str) -> list[Unit]:
    """Cuts large files and groups small neighbours into units of about the same size."""
    stats = []
    for path, _, _ in files:
        try:
            stats.append(os.stat(path))
        except OSError as error:
            raise DataError(f"{key}.path: {path}: {error.strerror}") from error
        if stats[-1].st_size == 0:
            raise DataError(f"{key}.path: {path}: the file is empty")
    total = sum(stat.st_size for stat in stats)
    unit_bytes = min(max(total // UNITS_OF_A_SMALL_SOURCE, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)

    units: list[Unit] = []
    group: list[Piece] = []
    group_format, group_bytes = "", 0

    def close_group() -> None:
        nonlocal group_bytes
        if group:
            units.append(Unit(key, group_format, text_field, tuple(group)))
        group.clear()
        group_bytes = 0

    for (path, name, kind), stat in zip(files, stats, strict=True):
        if kind != group_format:
            close_group()
            group_format = kind
        for start, stop, num_bytes in _ranges(path, kind, stat.st_size, unit_bytes, text_field):
            group.append(Piece(path, name, stat.st_size, stat.st_mtime_ns, start, stop))
            group_bytes += num_bytes
            if group_bytes >= unit_bytes:
                close_group()
    close_group()
    return units


def _ranges(
    path: str, kind: str, size: int, unit_bytes: int, text_field: str
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of each piece of a file."""
    if kind == "parquet":
        file = _open_parquet(path, text_field)
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        start = filled = 0
        for i, row_group_bytes in enumerate(sizes):
            filled += row_group_bytes
            if filled >= unit_bytes or i + 1 == len(sizes):
                yield start, i + 1, filled
                start, filled = i + 1, 0
    elif kind == "python-docs":
        yield 0, size, size
    else:
        count = max(1, round(size / unit_bytes))
        bounds = [size * i // count for i in range(count + 1)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            yield start, stop, stop - start


def _open_parquet(path: str, text_field: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise DataError(f"{path}: no column {text_field!r}; its columns are {', '.join(names)}")
    column = file.schema_arrow.field(text_field).type
    if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
        raise DataError(f"{path}: column {text_field!r} is of type {column}, not string")
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: the file is empty: it has no rows")
    return file


# Documents ----------------------------------------------------------------------------------------


def read_documents(unit: Unit) -> list[str]:
    """The texts of a unit's documents; those without a character are left out.

    Raises:
        DataError: naming the file, and the line or row.
    """
    documents: list[str] = []
    for piece in unit.pieces:
        try:
            stat = os.stat(piece.path)
            if (stat.st_size, stat.st_mtime_ns) != (piece.size, piece.mtime_ns):
                raise DataError(f"{unit.key}: {piece.path}: changed since the run was planned")
            documents += _READERS[unit.format](piece, unit.text_field)
        except (OSError, pyarrow.lib.ArrowException) as error:
            raise DataError(f"{unit.key}: {piece.path}: cannot be read: {error}") from error
        except DataError as error:
            known = str(error).startswith(unit.key)
            raise error if known else DataError(f"{unit.key}: {error}") from None
    return [document for document in documents if document]


def hash_documents(documents: list[str]) -> str:
    """The sha256 of documents and their borders."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def _read_lines(piece: Piece) -> tuple[bytes, int]:
    """The bytes of the lines that start in a piece's range, and where the first one starts."""
    with open(piece.path, "rb") as file:
        start = piece.start
        if start:  # a line that starts before belongs to the piece before
            file.seek(start - 1)
            start += len(file.readline()) - 1
        if start >= piece.stop:
            return b"", start
        file.seek(start)
        data = file.read(piece.stop - start)
        if not data.endswith(b"\n"):
            data += file.readline()
        return data, start


def _line_number(path: str, offset: int) -> int:
    """The line of a byte, from 1; reads the file up to there, so it is for messages only."""
    lines, left = 1, offset
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines


def _decode(data: bytes, piece: Piece, start: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise DataError(
            f"{piece.path}:{_line_number(piece.path, at)}: byte {at} (0x{data[error.start]:02x}) "
            "is not UTF-8 text"
        ) from error


def _read_text(piece: Piece, text_field: str) -> list[str]:
    data, start = _read_lines(piece)
    if start == 0 and data.startswith(b"\xef\xbb\xbf"):
        data, start = data[3:], 3
    return [_decode(data, piece, start)]


def _read_jsonl(piece: Piece, text_field: str) -> list[str]:
    data, at = _read_lines(piece)
    documents = []
    for line in data.split(b"\n"):
        if line.strip():
            documents.append(_parse_line(line, piece, at, text_field))
        at += len(line) + 1
    return documents


def _parse_line(line: bytes, piece: Piece, at: int, text_field: str) -> str:
    text = _decode(line, piece, at)
    try:
        value = json.loads(text)
        problem = None if isinstance(value, dict) else "expected an object"
    except json.JSONDecodeError as error:
        value, problem = {}, f"not JSON: {error.msg} at column {error.colno}"
    if problem is None and text_field not in value:
        problem = f"no field {text_field!r}; its fields are {', '.join(value)}"
    if problem is None and not isinstance(value[text_field], str):
        problem = f"field {text_field!r} is no string"
    if problem is not None:
        raise DataError(f"{piece.path}:{_line_number(piece.path, at)}: {problem}")
    document = value[text_field]
    try:
        document.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        where = f"{piece.path}:{_line_number(piece.path, at)}"
        raise DataError(f"{where}: field {text_field!r}: {error.reason}") from error
    return document


def _read_parquet(piece: Piece, text_field: str) -> list[str]:
    file = _open_parquet(piece.path, text_field)
    row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    documents: list[str] = []
    groups = list(range(piece.start, piece.stop))
    for batch in file.iter_batches(row_groups=groups, columns=[text_field]):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{piece.path}: rows {row} to {row + batch.num_rows - 1}: not UTF-8 text: {error}"
            ) from error
        if None in texts:
            raise DataError(f"{piece.path}: row {row + texts.index(None)}: {text_field!r} is null")
        documents += texts
        row += len(texts)
    return documents


def _read_python_docs(piece: Piece, text_field: str) -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "python-docs": _read_python_docs,
}
