"""Config → files → units of text, from directory listings, sizes and parquet footers alone.

A unit is whole small files, a byte range of a large one, row groups of a parquet file, or one file
of a dataset on the Hugging Face hub. A plan over terabytes is made without reading their text; how
files were cut is kept in the cache, so footers are read once.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fla_dist.config import SourceConfig
from fla_dist.data.documents import COMPRESSIONS, open_parquet
from fla_dist.data.errors import DataError
from fla_dist.data.shard import write_atomically
from fla_dist.data.units import (
    WHOLE,
    Division,
    Files,
    TextRule,
    UnitTable,
    dump_division,
    load_division,
    make_table,
)

LARGEST_UNIT_BYTES = 32 << 20
SMALLEST_UNIT_BYTES = 64 << 10
UNITS_OF_A_SMALL_SOURCE = 32  # so that training can start on its first ones, and lanes differ
DIVISION_VERSION = 2
TYPICAL_COMPRESSION = 4

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
class Source:
    """One entry of the config's sources, resolved.

    Attributes:
        key: as in `data.sources.0`.
    """

    key: str
    weight: float
    units: UnitTable


def resolve_sources(
    configs: Iterable[SourceConfig], key: str, *, plans: Path | None = None
) -> list[Source]:
    """Finds the files of every source; `key` is the config key of the list.

    Args:
        plans: directory that keeps how files were cut.
    """
    return [_resolve(config, f"{key}.{i}", plans) for i, config in enumerate(configs)]


def _resolve(config: SourceConfig, key: str, plans: Path | None) -> Source:
    rule = TextRule(
        config.text_field, config.template, config.min_characters, config.max_characters
    )
    try:
        rule.fields()
    except DataError as error:
        raise DataError(f"{key}.{error}") from error
    scheme, _, rest = config.path.partition(":")
    if scheme == "python-docs":
        spec = importlib.util.find_spec("pydoc_data.topics")
        if rest or spec is None or spec.origin is None:
            raise DataError(f"{key}.path: {config.path}: this Python has no such documents")
        files = _stat(os.path.dirname(spec.origin), [("topics.py", "python-docs")], key)
    elif scheme == "python-source":
        root = _python_root(rest, config.path, key)
        files = _stat(root, [(name, "text") for name in _python_files(root)], key)
    elif scheme == "hf":
        from fla_dist.data.hub import find_hub_files

        files = find_hub_files(config, key, plans)
    else:
        files = _stat(*_find_files(config, key), key)
    units = make_table(key, rule, files, _divide(files, rule, key, plans))
    if not units:
        raise DataError(f"{key}.path: {config.path}: no file there has text")
    return Source(key, config.weight, units)


def _python_root(package: str, path: str, key: str) -> str:
    """The directory of the standard library, or of an installed package."""
    if not package:
        return sysconfig.get_paths()["stdlib"]
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{key}.path: {path}: no package {package!r} is installed")
    return os.path.abspath(spec.submodule_search_locations[0])


def _python_files(root: str) -> Iterator[str]:
    """Its Python files without tests."""
    for directory, children, names in os.walk(root):
        children[:] = sorted(set(children) - TEST_DIRECTORIES - NOT_SOURCE_DIRECTORIES)
        for name in sorted(names):
            full = os.path.join(directory, name)
            if name.endswith(".py") and os.path.getsize(full):
                yield os.path.relpath(full, root)


def _format(name: str) -> str | None:
    """By suffix, whether compressed or not."""
    stem, suffix = os.path.splitext(name)
    if suffix in COMPRESSIONS:
        inner = SUFFIXES.get(os.path.splitext(stem)[1])
        return None if inner == "parquet" else inner
    return SUFFIXES.get(suffix)


def _find_files(config: SourceConfig, key: str) -> tuple[str, list[tuple[str, str]]]:
    """(root, [(name in it, format) of each file, sorted by name])."""
    path = os.path.abspath(os.path.expanduser(config.path))
    known = " ".join(SUFFIXES)
    if os.path.isdir(path):
        root = path
        names = []
        for folder, children, found in os.walk(path):
            children[:] = [child for child in children if child[0] != "."]
            prefix = os.path.relpath(folder, root) + os.sep if folder != root else ""
            names += [prefix + name for name in found if name[0] != "."]
        if config.format == "auto":
            names = [name for name in names if _format(name)]
        what = f"the directory holds no {known if config.format == 'auto' else 'file'}"
    elif os.path.exists(path):
        root, name = os.path.split(path)
        names, what = [name], ""
    else:
        paths = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        root = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
        names = [os.path.relpath(p, root) for p in paths]
        what = "no file matches" if glob.has_magic(path) else "no such file"
    if not names:
        raise DataError(f"{key}.path: {config.path}: {what}")
    files = []
    for name in sorted(names):
        kind = _format(name) if config.format == "auto" else config.format
        if kind is None:
            raise DataError(
                f"{key}.format: 'auto' knows {known} and of text and jsonl "
                f"{' '.join(COMPRESSIONS)}, not {os.path.join(root, name)}; "
                "set text, jsonl or parquet"
            )
        files.append((name, kind))
    return root, files


def _stat(root: str, found: list[tuple[str, str]], key: str) -> Files:
    files = Files(root, [], [], [], [])
    for name, kind in found:
        path = os.path.join(root, name)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"{key}.path: {path}: {error.strerror}") from error
        if stat.st_size == 0:
            raise DataError(f"{key}.path: {path}: the file is empty")
        files.names.append(name)
        files.formats.append(kind)
        files.sizes.append(stat.st_size)
        files.mtimes_ns.append(stat.st_mtime_ns)
    return files


def _divide(files: Files, rule: TextRule, key: str, plans: Path | None) -> Sequence[np.ndarray]:
    """Cuts large files and groups small neighbours into units of about the same size."""
    total = sum(files.sizes)
    unit_bytes = min(max(total // UNITS_OF_A_SMALL_SOURCE, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)
    path = plans and plans / f"{DIVISION_VERSION}-{unit_bytes}-{files.sha256(rule)[:32]}.npz"
    if path is not None:
        try:
            return load_division(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there, or damaged
    division = Division()
    filled = 0
    for file, (name, kind, size) in enumerate(
        zip(files.names, files.formats, files.sizes, strict=True)
    ):
        if file and kind != files.formats[file - 1]:
            division.end_unit()
            filled = 0
        source_path = os.path.join(files.root, name)
        for start, stop, num_bytes in _ranges(source_path, kind, size, unit_bytes, rule, key):
            division.add_piece(file, start, stop)
            filled += num_bytes
            if filled >= unit_bytes or kind == "hub":
                division.end_unit()
                filled = 0
    division.end_unit()
    arrays = division.arrays()
    del division  # of a million units, it is tens of megabytes
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [dump_division(arrays)])
        except OSError as error:
            raise DataError(f"data.cache_dir: {path.parent}: {error.strerror}") from error
    return arrays


def _ranges(
    path: str, kind: str, size: int, unit_bytes: int, rule: TextRule, key: str
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of each piece of a file."""
    if kind == "parquet":
        try:
            metadata = open_parquet(path, rule.fields()).metadata
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        start = filled = 0
        for i in range(metadata.num_row_groups):
            filled += metadata.row_group(i).total_byte_size
            if filled >= unit_bytes or i + 1 == metadata.num_row_groups:
                yield start, i + 1, filled
                start, filled = i + 1, 0
    elif kind in ("python-docs", "hub"):
        yield 0, WHOLE, size
    elif os.path.splitext(path)[1] in COMPRESSIONS:  # can be read from its start only
        yield 0, WHOLE, size * TYPICAL_COMPRESSION
    else:
        count = max(1, round(size / unit_bytes))
        start = 0
        for i in range(count):
            stop = size * (i + 1) // count
            yield start, stop, stop - start
            start = stop
