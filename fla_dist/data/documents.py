"""The documents of one unit.

Text and jsonl are read line by line here and not through `datasets`: its readers name neither the
file's line nor the byte of a bad input, and take no byte range. Parquet is read by pyarrow, which
`datasets` would call, for the same reason: it takes row groups and keeps row numbers. Compressed
files are read through pyarrow's codecs, which come with `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from fla_dist.data.errors import DataError
from fla_dist.data.units import WHOLE, Piece, TextRule, Unit

if TYPE_CHECKING:
    import pyarrow.parquet as pq

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def read_documents(unit: Unit) -> list[str]:
    """The texts of a unit's documents; those whose length the rule excludes are left out.

    Raises:
        DataError: naming the file, and the line or row.
    """
    import pyarrow as pa

    documents: list[str] = []
    for piece in unit.pieces:
        try:
            if unit.format != "hub":
                stat = os.stat(piece.path)
                if (stat.st_size, stat.st_mtime_ns) != (piece.size, piece.mtime_ns):
                    raise DataError(f"{piece.path}: changed since the run was planned")
            documents += _READERS[unit.format](piece, unit.rule)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise DataError(f"{unit.key}: {piece.path}: cannot be read: {error}") from error
        except DataError as error:
            raise DataError(f"{unit.key}: {error}") from error.__cause__
    return [document for document in documents if document and unit.rule.keeps(document)]


def hash_documents(documents: list[str]) -> str:
    """The sha256 of documents and their borders."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def open_parquet(path: str, fields: list[str]) -> pq.ParquetFile:
    """
    Raises:
        DataError: not a parquet file with rows and with these columns of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    names = file.schema_arrow.names
    for name in fields:
        if name not in names:
            raise DataError(f"{path}: no column {name!r}; its columns are {', '.join(names)}")
        column = file.schema_arrow.field(name).type
        if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
            raise DataError(f"{path}: column {name!r} is of type {column}, not string")
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: the file is empty: it has no rows")
    return file


def _open(path: str) -> BinaryIO:
    """The bytes of a file, decompressed if its name says that it is compressed."""
    import pyarrow as pa

    compression = COMPRESSIONS.get(os.path.splitext(path)[1])
    return open(path, "rb") if compression is None else pa.input_stream(path, compression)


def _read_lines(piece: Piece) -> tuple[bytes, int]:
    """The bytes of the lines that start in a piece's range, and where the first one starts."""
    with _open(piece.path) as file:
        if piece.stop == WHOLE:
            return file.read(), 0
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
    with _open(path) as file:
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


def _read_text(piece: Piece, rule: TextRule) -> list[str]:
    data, start = _read_lines(piece)
    if start == 0 and data.startswith(b"\xef\xbb\xbf"):
        data, start = data[3:], 3
    return [_decode(data, piece, start)]


def _read_jsonl(piece: Piece, rule: TextRule) -> list[str]:
    data, at = _read_lines(piece)
    fields = rule.fields()
    documents = []
    for line in data.split(b"\n"):
        if line.strip():
            documents.append(_parse_line(line, piece, at, fields, rule))
        at += len(line) + 1
    return documents


def _parse_line(line: bytes, piece: Piece, at: int, fields: list[str], rule: TextRule) -> str:
    def where() -> str:
        return f"{piece.path}:{_line_number(piece.path, at)}"

    text = _decode(line, piece, at)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where()}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where()}: expected an object")
    document = make_document(row, fields, rule, where)
    try:
        document.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        names = ", ".join(map(repr, fields))
        raise DataError(f"{where()}: field {names}: {error.reason}") from error
    return document


def make_document(
    row: Mapping[str, Any], fields: list[str], rule: TextRule, where: Callable[[], str]
) -> str:
    """The document of a row.

    Raises:
        DataError: a field is missing or no string, at `where`.
    """
    for name in fields:
        if name not in row:
            raise DataError(f"{where()}: no field {name!r}; its fields are {', '.join(row)}")
        if not isinstance(row[name], str):
            raise DataError(f"{where()}: field {name!r} is no string")
    return rule.make(row)


def _read_parquet(piece: Piece, rule: TextRule) -> list[str]:
    fields = rule.fields()
    file = open_parquet(piece.path, fields)
    row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    documents: list[str] = []
    groups = list(range(piece.start, piece.stop))
    for batch in file.iter_batches(row_groups=groups, columns=fields):
        columns = {}
        for name in fields:
            try:
                texts = columns[name] = batch.column(name).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{piece.path}: rows {row} to {row + batch.num_rows - 1}: not UTF-8 text: "
                    f"{error}"
                ) from error
            if None in texts:
                raise DataError(f"{piece.path}: row {row + texts.index(None)}: {name!r} is null")
        if rule.template is None:
            documents += columns[rule.text_field]
        else:
            rows = zip(*columns.values(), strict=True)
            documents += (rule.make(dict(zip(fields, texts, strict=True))) for texts in rows)
        row += batch.num_rows
    return documents


def _read_python_docs(piece: Piece, rule: TextRule) -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_hub(piece: Piece, rule: TextRule) -> list[str]:
    from fla_dist.data.hub import read_hub_file

    return read_hub_file(piece, rule)


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "python-docs": _read_python_docs,
    "hub": _read_hub,
}
