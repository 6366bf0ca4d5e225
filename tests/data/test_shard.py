"""The shard's format: whole or absent, and no damaged byte is ever delivered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dist.data import shard as shard_module
from fla_dist.data.errors import DamagedShardError
from fla_dist.data.shard import Shard, write_shard


def write(path, documents, dtype="uint16"):
    write_shard(
        path,
        [np.array(document, dtype) for document in documents],
        dtype=dtype,
        source_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
    )


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=20),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
@settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory, documents, dtype):
    path = tmp_path_factory.mktemp("shard") / "x.tokens"
    write(path, documents, dtype)
    shard = Shard(path)
    begins = shard.begins.tolist()
    tokens = np.empty(shard.header.tokens, dtype)
    shard.read(shard.begins[:-1], shard.begins, tokens)
    got = [tokens[a:b].tolist() for a, b in zip(begins, begins[1:], strict=False)]
    assert got == documents
    assert shard.header.tokens == sum(map(len, documents))


def test_any_flipped_bit_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 64)
    path = tmp_path / "x.tokens"
    write(path, [range(i, i + 20) for i in range(10)])
    good = path.read_bytes()
    for offset in range(len(good)):
        bad = bytearray(good)
        bad[offset] ^= 1 << (offset % 8)
        path.write_bytes(bad)
        with pytest.raises(DamagedShardError, match=r"x\.tokens"):
            Shard(path).verify()


def test_a_block_is_checked_at_its_first_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 64)
    path = tmp_path / "x.tokens"
    write(path, [range(100)])
    data = bytearray(path.read_bytes())
    first_token = data.index(np.arange(100, dtype=np.uint16).tobytes())
    data[first_token + 2 * 40] ^= 1  # token 40, in the second block
    path.write_bytes(data)
    shard = Shard(path)
    shard.read(np.array([0]), np.array([0, 32]), np.empty(32, np.uint16))
    with pytest.raises(DamagedShardError, match="block 1 of"):
        shard.read(np.array([0, 30]), np.array([0, 1, 4]), np.empty(4, np.uint16))


@pytest.mark.parametrize("size", [0, 3, 16, 40, -1])
def test_truncated(tmp_path, size):
    path = tmp_path / "x.tokens"
    write(path, [range(100)])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedShardError, match=r"x\.tokens"):
        Shard(path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x.tokens", [[1, 2]])
    assert list(tmp_path.iterdir()) == []
