"""Datasets of the Hugging Face hub, through `datasets`: its listing of files, and one file's rows.

Nothing of its shuffling, interleaving or resume state is used: a unit is one data file. The files
of a dataset whose config names no revision are those of the commit that the first run saw; the
cache keeps their addresses, which name that commit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from fla_dist.config import SourceConfig
from fla_dist.data.documents import make_document
from fla_dist.data.errors import DataError
from fla_dist.data.lease import hold
from fla_dist.data.shard import write_atomically
from fla_dist.data.units import Files, Piece, TextRule

logger = logging.getLogger(__name__)

READERS = ("json", "parquet", "text", "csv", "arrow")
SEPARATOR = "::"  # reader::address, the name of a hub file


def find_hub_files(config: SourceConfig, key: str, plans: Path | None) -> Files:
    """The data files of `hf:name`, pinned to one revision.

    Raises:
        DataError: there is no such dataset, or it is in a format that has no text.
    """
    name = config.path.partition(":")[2]
    wanted = [name, config.subset, config.split, config.revision]
    if plans is None:
        return _as_files(_list_files(config, name, key))
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]
    pin = plans / f"hub-{digest}.json"
    names = _read_pin(pin)
    if names is None:
        plans.mkdir(parents=True, exist_ok=True)
        with hold(pin.with_suffix(".lease")):
            names = _read_pin(pin)  # another process may have made it
            if names is None:
                names = _list_files(config, name, key)
                content = json.dumps({"dataset": wanted, "files": names}, indent=1)
                write_atomically(pin, [content.encode()])
                logger.info("%s: %s: pinned by %s", key, config.path, pin)
    return _as_files(names)


def _read_pin(path: Path) -> list[str] | None:
    try:
        return json.loads(path.read_text())["files"]
    except (OSError, ValueError, KeyError):
        return None


def _as_files(names: list[str]) -> Files:
    count = len(names)
    return Files("", names, ["hub"] * count, [0] * count, [0] * count)


def _list_files(config: SourceConfig, name: str, key: str) -> list[str]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config.subset, revision=config.revision)
    except Exception as error:  # of every layer down to the socket
        raise DataError(f"{key}.path: {config.path}: {error}") from error
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in READERS:
        raise DataError(f"{key}.path: {config.path}: is read by {reader!r}, which gives no text")
    by_split: dict[Any, Any] = dict(builder.config.data_files or {})
    if config.split not in by_split:
        raise DataError(f"{key}.split: {config.split!r} is none of {', '.join(map(str, by_split))}")
    return sorted(f"{reader}{SEPARATOR}{file}" for file in by_split[config.split])


def read_hub_file(piece: Piece, rule: TextRule) -> list[str]:
    import datasets

    reader, _, address = piece.name.partition(SEPARATOR)
    fields = rule.fields()
    documents: list[str] = []

    def where() -> str:
        return f"{address}: row {len(documents)}"

    try:
        rows = datasets.load_dataset(reader, data_files=[address], split="train", streaming=True)
        for values in rows:
            documents.append(make_document(values, fields, rule, where))
    except DataError:
        raise
    except Exception as error:  # of every layer down to the socket
        raise DataError(f"{where()}: {error}") from error
    return documents
