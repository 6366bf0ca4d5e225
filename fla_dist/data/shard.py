"""One unit's tokens on disk.

    magic 8 B | header's length 4 B | header's crc32 4 B | header, JSON
    tokens    uint16 or uint32, all documents one after another
    ends      uint64, each document's end in tokens
    crcs      uint32, one a 16 KiB block of tokens-and-ends

A shard is written under a temporary name, flushed to the disk and renamed, so a name that exists is
a whole shard. Its header, size, crcs and ends are checked when it is opened, its tokens block by
block when they are first read. Blocks are as small as what is read at once, or each rank of a
sequence-parallel group would check nearly every block for its slices. A shard is read and not
mapped: mapped pages count as the reader's memory, and a disk's error would be a signal that ends
the process instead of an exception.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fla_dist.data.errors import DamagedShardError

MAGIC = b"FLATOK02"
PREFIX_BYTES = 16
BLOCK_BYTES = 1 << 14
BLOCKS_AT_ONCE = 64


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
    """An open shard.

    Attributes:
        begins: [documents + 1] where each document begins, and the end of the last.

    Raises:
        DamagedShardError: at opening or reading, where the bytes are not those written.
        FileNotFoundError: there is none.
        OSError: the disk cannot read it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        prefix = os.pread(self._file, PREFIX_BYTES, 0)
        length, crc = int.from_bytes(prefix[8:12], "little"), prefix[12:16]
        size = os.fstat(self._file).st_size
        good = prefix[:8] == MAGIC and length <= size
        text = os.pread(self._file, length, PREFIX_BYTES) if good else b""
        if len(text) != length or zlib.crc32(text).to_bytes(4, "little") != crc:
            raise DamagedShardError(f"{path}: its header is damaged")
        self.header = ShardHeader(**json.loads(text))
        self._itemsize = np.dtype(self.header.dtype).itemsize
        token_bytes = self.header.tokens * self._itemsize
        self._data_bytes = token_bytes + 8 * self.header.documents
        self._start = PREFIX_BYTES + length
        num_blocks = -(-self._data_bytes // BLOCK_BYTES)
        expected = self._start + self._data_bytes + 4 * num_blocks
        if size != expected:
            raise DamagedShardError(f"{path}: {size} bytes, its header says {expected}")
        crcs = bytearray(4 * num_blocks)
        self._read(self._data_bytes, crcs)
        if zlib.crc32(crcs) != self.header.crcs_crc32:
            raise DamagedShardError(f"{path}: its table of checksums is damaged")
        self._crcs = memoryview(crcs).cast("I")
        self._unchecked = bytearray(b"\1" * num_blocks)
        self._num_unchecked = num_blocks
        self._check(token_bytes, self._data_bytes)
        self.begins = np.zeros(self.header.documents + 1, np.int64)
        self._read(token_bytes, self.begins[1:].data)

    def read(self, starts: Sequence[int], bounds: Sequence[int], out: np.ndarray) -> None:
        """Copies the tokens from `starts[i]` on to `out[bounds[i] : bounds[i + 1]]`.

        Args:
            out: of the shard's dtype, contiguous; `bounds` ends with its length.
        """
        # Of many short documents these few lines are most of the time.
        size, file, data_at = self._itemsize, self._file, self._start
        view = out.data.cast("B")
        read, begin = 0, bounds[0] * size
        for start, bound in zip(starts, bounds[1:], strict=True):
            offset, end = start * size, bound * size
            if self._num_unchecked:
                self._check(offset, offset + end - begin)
            read += os.preadv(file, (view[begin:end],), data_at + offset)
            begin = end
        if read != begin - bounds[0] * size:
            raise self._cut_off()

    def verify(self) -> None:
        """Checks every byte."""
        self._check(0, self._data_bytes)

    def _read(self, offset: int, out: bytearray | memoryview) -> None:
        """Fills `out` from a byte of the data on."""
        wanted = memoryview(out).nbytes
        if os.preadv(self._file, [out], self._start + offset) != wanted:
            raise self._cut_off()

    def _cut_off(self) -> DamagedShardError:
        return DamagedShardError(f"{self.path}: was cut off while it was open")

    def _check(self, first_byte: int, last_byte: int) -> None:
        """Reads and sums the blocks of a range that were not read before."""
        first, last = first_byte // BLOCK_BYTES, -(-last_byte // BLOCK_BYTES)
        while (first := self._unchecked.find(1, first, last)) >= 0:
            behind = self._unchecked.find(0, first, min(last, first + BLOCKS_AT_ONCE))
            behind = min(last, first + BLOCKS_AT_ONCE) if behind < 0 else behind
            begin, end = first * BLOCK_BYTES, min(behind * BLOCK_BYTES, self._data_bytes)
            data = memoryview(os.pread(self._file, end - begin, self._start + begin))
            if len(data) != end - begin:
                raise self._cut_off()
            for block in range(first, behind):
                at = (block - first) * BLOCK_BYTES
                if zlib.crc32(data[at : at + BLOCK_BYTES]) != self._crcs[block]:
                    raise DamagedShardError(
                        f"{self.path}: block {block} of {len(self._crcs)} is damaged"
                    )
                self._unchecked[block] = 0
            self._num_unchecked -= behind - first
            first = behind
