"""What one builder task reads, and a compact table of a million of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import string
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fla_dist.data.errors import DataError

FORMATS = ("text", "jsonl", "parquet", "python-docs", "hub")
WHOLE = -1  # stop of a piece that is a file of unknown extent: all of it


@dataclass(frozen=True)
class TextRule:
    """How a document is made of a row.

    Attributes:
        text_field: the row's text; not used with a template.
        template: as in "{title}\\n\\n{text}", of fields' names.
        min_characters, max_characters: documents outside of these lengths are left out.
    """

    text_field: str = "text"
    template: str | None = None
    min_characters: int = 1
    max_characters: int | None = None

    def fields(self) -> list[str]:
        """The fields a row must have.

        Raises:
            DataError: the template is not one.
        """
        if self.template is None:
            return [self.text_field]
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise DataError(f"template: {self.template!r}: {error}") from error
        names = [name for _, name, _, _ in parts if name is not None]
        if not all(names) or any(spec or conversion for _, _, spec, conversion in parts):
            raise DataError(f"template: {self.template!r}: braces hold fields' names only")
        if not names:
            raise DataError(f"template: {self.template!r}: names no field")
        return list(dict.fromkeys(names))

    def make(self, values: Mapping[str, str]) -> str:
        """The document of a row's checked fields."""
        if self.template is None:
            return values[self.text_field]
        return "".join(
            literal + ("" if name is None else values[name])
            for literal, name, _, _ in string.Formatter().parse(self.template)
        )

    def keeps(self, document: str) -> bool:
        most = self.max_characters
        return len(document) >= self.min_characters and (most is None or len(document) <= most)


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
        format: text (a file, or a range of one, is a document), jsonl, parquet, python-docs or hub.
    """

    key: str
    format: str
    rule: TextRule
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Unit:
        pieces = tuple(Piece(**piece) for piece in value["pieces"])
        return Unit(**{**value, "rule": TextRule(**value["rule"]), "pieces": pieces})

    def identity(self) -> list[Any]:
        """What makes a unit another one: any change of its files or of what is made of them."""
        pieces = [[p.path, p.size, p.mtime_ns, p.start, p.stop] for p in self.pieces]
        return [self.format, *asdict(self.rule).values(), pieces]


@dataclass(frozen=True)
class UnitTable(Sequence[Unit]):
    """A source's units in a few arrays, tens of bytes a unit; a Unit is made when asked for.

    Attributes:
        root: directory of the files.
        names: every file's name in it, in UTF-8, one after another.
        name_ends: [files] where each name ends.
        sizes, mtimes_ns: [files].
        formats: [files] indices into FORMATS.
        piece_files, piece_starts, piece_stops: [pieces].
        ends: [units] where each unit's pieces end.
    """

    key: str
    rule: TextRule
    root: str
    names: np.ndarray
    name_ends: np.ndarray
    sizes: np.ndarray
    mtimes_ns: np.ndarray
    formats: np.ndarray
    piece_files: np.ndarray
    piece_starts: np.ndarray
    piece_stops: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Unit]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, last = (int(self.ends[index - 1]) if index else 0), int(self.ends[index])
        pieces = []
        for piece in range(first, last):
            file = int(self.piece_files[piece])
            name = self.name(file)
            pieces.append(
                Piece(
                    path=os.path.join(self.root, name) if self.root else name,
                    name=name,
                    size=int(self.sizes[file]),
                    mtime_ns=int(self.mtimes_ns[file]),
                    start=int(self.piece_starts[piece]),
                    stop=int(self.piece_stops[piece]),
                )
            )
        return Unit(self.key, FORMATS[self.formats[file]], self.rule, tuple(pieces))

    def name(self, file: int) -> str:
        begin = int(self.name_ends[file - 1]) if file else 0
        return self.names[begin : int(self.name_ends[file])].tobytes().decode()

    def sha256(self, *, moved: bool) -> str:
        """Of all that makes two tables the same; with `moved`, wherever and whenever the files were
        put."""
        digest = hashlib.sha256(json.dumps(list(asdict(self.rule).values())).encode())
        arrays = [self.names, self.name_ends, self.sizes, self.formats]
        arrays += [self.piece_files, self.piece_starts, self.piece_stops, self.ends]
        if not moved:
            digest.update(self.root.encode())
            arrays.append(self.mtimes_ns)
        for values in arrays:
            digest.update(f"{len(values)} {values.dtype.str} ".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


@dataclass
class Files:
    """A source's files, sorted by name, as they were listed."""

    root: str
    names: list[str]
    formats: list[str]
    sizes: list[int]
    mtimes_ns: list[int]

    def sha256(self, rule: TextRule) -> str:
        digest = hashlib.sha256(json.dumps([self.root, *asdict(rule).values()]).encode())
        for values in (self.names, self.formats, self.sizes, self.mtimes_ns):
            digest.update(json.dumps(values).encode())
        return digest.hexdigest()


@dataclass
class Division:
    """How files are cut into pieces and the pieces grouped into units; filled piece by piece."""

    files: array[int] = field(default_factory=lambda: array("q"))
    starts: array[int] = field(default_factory=lambda: array("q"))
    stops: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))

    def add_piece(self, file: int, start: int, stop: int) -> None:
        self.files.append(file)
        self.starts.append(start)
        self.stops.append(stop)

    def end_unit(self) -> None:
        if len(self.files) > (self.ends[-1] if self.ends else 0):
            self.ends.append(len(self.files))

    def arrays(self) -> Sequence[np.ndarray]:
        values = (self.files, self.starts, self.stops, self.ends)
        return [_compact(np.frombuffer(value, np.int64)) for value in values]


def _compact(values: np.ndarray) -> np.ndarray:
    """The same integers in the narrowest type that holds them, WHOLE included."""
    largest = int(values.max(initial=0))
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return values.astype(next(kind for kind in kinds if largest <= np.iinfo(kind).max))


def dump_division(arrays: Sequence[np.ndarray]) -> memoryview:
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getbuffer()


def load_division(path: Path) -> Sequence[np.ndarray]:
    """
    Raises:
        OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: not there, or not what
            `dump_division` gave; npz has checksums.
    """
    with np.load(path) as stored:
        return [stored[f"arr_{i}"] for i in range(4)]


def make_table(key: str, rule: TextRule, files: Files, division: Sequence[np.ndarray]) -> UnitTable:
    """
    Args:
        division: the arrays of a Division.
    """
    piece_files, piece_starts, piece_stops, ends = division
    encoded = [name.encode() for name in files.names]
    return UnitTable(
        key=key,
        rule=rule,
        root=files.root,
        names=np.frombuffer(b"".join(encoded), np.uint8),
        name_ends=np.cumsum([len(name) for name in encoded], dtype=np.int64),
        sizes=np.array(files.sizes, np.int64),
        mtimes_ns=np.array(files.mtimes_ns, np.int64),
        formats=np.array([FORMATS.index(name) for name in files.formats], np.uint8),
        piece_files=piece_files,
        piece_starts=piece_starts,
        piece_stops=piece_stops,
        ends=ends,
    )
