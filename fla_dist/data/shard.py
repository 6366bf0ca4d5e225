"""One unit's tokens on disk.

    magic 8 B | header's length 4 B | header's crc32 4 B | header, JSON
    tokens    uint16 or uint32, all documents one after another
    ends      uint64, each document's end in tokens
    crcs      uint32, one a 1 MiB block of tokens-and-ends

A shard is written under a temporary name, flushed to the disk and renamed, so a name that exists is
a whole shard. Its header, size, crcs and ends are checked when it is opened, its tokens block by
block when they are first read.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fla_dist.data.errors import DamagedShardError

MAGIC = b"FLATOK01"
PREFIX_BYTES = 16
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardHeader:
    dtype: str
    tokens: int
    documents: int
    source_sha256: str
    tokenizer_sha256: str
    crcs_crc32: int


def write_atomically(path: Path, chunks: Sequence[bytes | memoryview]) -> None:
    """Writes a file that either exists whole, on the disk, or not at all."""
    temporary = path.parent / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_shard(
    path: Path,
    documents: Sequence[np.ndarray],
    *,
    dtype: str,
    source_sha256: str,
    tokenizer_sha256: str,
) -> None:
    """Writes the token arrays of a unit's documents, in order."""
    tokens = np.concatenate([np.empty(0, dtype), *documents]).astype(dtype, copy=False)
    ends = np.cumsum([len(document) for document in documents], dtype=np.uint64)
    data = tokens.tobytes() + ends.tobytes()
    blocks = range(0, len(data), BLOCK_BYTES)
    view = memoryview(data)
    crcs = np.array([zlib.crc32(view[b : b + BLOCK_BYTES]) for b in blocks], np.uint32).tobytes()
    header = json.dumps(
        asdict(
            ShardHeader(
                dtype=dtype,
                tokens=len(tokens),
                documents=len(documents),
                source_sha256=source_sha256,
                tokenizer_sha256=tokenizer_sha256,
                crcs_crc32=zlib.crc32(crcs),
            )
        )
    ).encode()
    header += b" " * (-(len(header) + PREFIX_BYTES) % 8)  # so that tokens and ends lie aligned
    prefix = MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    write_atomically(path, [prefix, header, data, crcs])


class Shard:
    """A memory-mapped shard.

    Attributes:
        tokens: [tokens], a view of the file; `check` what is read of it.
        begins: [documents + 1] where each document begins, and the end of the last.

    Raises:
        DamagedShardError: at opening or reading, where the bytes are not those written.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            prefix = file.read(PREFIX_BYTES)
            length, crc = int.from_bytes(prefix[8:12], "little"), prefix[12:16]
            text = file.read(length) if prefix[:8] == MAGIC else b""
            if len(text) != length or zlib.crc32(text).to_bytes(4, "little") != crc:
                raise DamagedShardError(f"{path}: its header is damaged")
            self.header = ShardHeader(**json.loads(text))
            itemsize = np.dtype(self.header.dtype).itemsize
            token_bytes = self.header.tokens * itemsize
            self._data_bytes = token_bytes + 8 * self.header.documents
            num_blocks = -(-self._data_bytes // BLOCK_BYTES)
            start = PREFIX_BYTES + length
            size = start + self._data_bytes + 4 * num_blocks
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise DamagedShardError(f"{path}: {actual} bytes, its header says {size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(self._map)
        self._start = start
        self._data = view[start : start + self._data_bytes]
        crcs = view[start + self._data_bytes :]
        if zlib.crc32(crcs) != self.header.crcs_crc32:
            raise DamagedShardError(f"{path}: its table of checksums is damaged")
        self._crcs = np.frombuffer(crcs, np.uint32)
        self._unchecked = bytearray(b"\1" * num_blocks)
        self._itemsize = itemsize
        self.tokens = np.frombuffer(self._data[:token_bytes], self.header.dtype)
        # Copied, since every use of a shard reads all of it: ends may lie unaligned in the file.
        self._check(token_bytes, self._data_bytes)
        ends = np.frombuffer(bytes(self._data[token_bytes:]), np.uint64).astype(np.int64)
        self.begins = np.concatenate([np.zeros(1, np.int64), ends])  # [documents + 1]

    def check(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Checks the blocks that hold tokens [start, stop) of each pair, before they are read."""
        if any(self._unchecked):
            first_bytes = (starts * self._itemsize).tolist()
            last_bytes = (stops * self._itemsize).tolist()
            for first_byte, last_byte in zip(first_bytes, last_bytes, strict=True):
                self._check(first_byte, last_byte)

    def release_pages(self) -> None:
        """Lets go of the file's pages in this process's memory; the system's cache keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Checks every byte."""
        self._check(0, self._data_bytes)

    def _check(self, first_byte: int, last_byte: int) -> None:
        for block in range(first_byte // BLOCK_BYTES, -(-last_byte // BLOCK_BYTES)):
            if self._unchecked[block]:
                offset = block * BLOCK_BYTES
                if zlib.crc32(self._data[offset : offset + BLOCK_BYTES]) != self._crcs[block]:
                    raise DamagedShardError(
                        f"{self.path}: 1 MiB block {block} of {len(self._unchecked)} is damaged"
                    )
                self._unchecked[block] = 0
                # Of a block, little is read at once: its pages need not stay in this process.
                page = (self._start + offset) // mmap.PAGESIZE * mmap.PAGESIZE
                end = min(self._start + offset + BLOCK_BYTES, len(self._map))
                self._map.madvise(mmap.MADV_DONTNEED, page, end - page)
