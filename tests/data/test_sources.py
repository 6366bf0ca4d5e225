"""Sources: what is read is what is in the files, and what is wrong is named with file and line."""

from __future__ import annotations

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dist.config import SourceConfig
from fla_dist.data import sources
from fla_dist.data.cache import TokenCache
from fla_dist.data.documents import read_documents
from fla_dist.data.errors import DataError
from fla_dist.data.sources import resolve_sources
from fla_dist.data.units import Piece, TextRule, Unit

TEXTS = [f"Document {i} — {'wörter ' * (i % 7)}\nsecond line" for i in range(60)]


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST_UNIT_BYTES", 256)


def read(path, **settings) -> list[str]:
    (source,) = resolve_sources([SourceConfig(str(path), **settings)], "data.sources")
    return [text for unit in source.units for text in read_documents(unit)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts))


def test_jsonl_in_many_units(tmp_path, small_units):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (source,) = resolve_sources([SourceConfig(str(tmp_path))], "data.sources")
    assert len(source.units) > 10
    assert read(tmp_path) == TEXTS


@given(
    lines=st.lists(st.text(alphabet="ab é\n", max_size=12), min_size=1, max_size=20),
    unit_bytes=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_any_cut_of_a_file_gives_each_line_once(tmp_path_factory, lines, unit_bytes):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    write_jsonl(path, [line + "." for line in lines])
    size = path.stat().st_size
    bounds = sorted({*range(0, size, unit_bytes), size})
    stat = path.stat()
    got = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        piece = Piece(str(path), "a.jsonl", size, stat.st_mtime_ns, start, stop)
        got += read_documents(Unit("data.sources.0", "jsonl", TextRule(), (piece,)))
    assert got == [line + "." for line in lines]


def test_text_files_are_documents_and_large_ones_are_cut_at_lines(tmp_path, small_units):
    for i, text in enumerate(TEXTS[:9]):
        (tmp_path / f"{i}.txt").write_text(text)
    assert read(tmp_path) == TEXTS[:9]
    assert read(tmp_path / "[0-4].txt") == TEXTS[:5]
    large = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "large.md").write_text(large)
    documents = read(tmp_path / "large.md")
    assert len(documents) > 10 and "".join(documents) == large
    assert all(document.endswith("\n") for document in documents)


def test_parquet_in_row_groups(tmp_path, small_units):
    pq.write_table(
        pa.table({"body": TEXTS, "n": range(60)}), tmp_path / "a.parquet", row_group_size=7
    )
    (source,) = resolve_sources(
        [SourceConfig(str(tmp_path / "*.parquet"), text_field="body")], "data.sources"
    )
    assert len(source.units) == 9
    assert read(tmp_path, text_field="body") == TEXTS


def test_built_in_sources():
    assert len(read("python-docs:")) > 50
    (source,) = resolve_sources([SourceConfig("python-source:")], "data.sources")
    assert len(source.units) > 16
    names = [piece.name for unit in source.units for piece in unit.pieces]
    assert "json/decoder.py" in names and not any("/test/" in name for name in names)
    assert read("python-source:json")[0].startswith('r"""JSON')


def test_mixed_directory_ignores_hidden_and_unknown_files(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    write_jsonl(tmp_path / "b.jsonl", ["second"])
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    assert read(tmp_path) == ["first", "second"]


def test_a_unit_survives_json(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (source,) = resolve_sources([SourceConfig(str(tmp_path))], "data.sources")
    (unit,) = source.units
    assert Unit.from_json(json.loads(json.dumps(unit.to_json()))) == unit


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("absent.txt", {}, r"data\.sources\.0\.path: .*absent\.txt: no such file"),
        ("*.csv", {}, r"data\.sources\.0\.path: .*no file matches"),
        ("empty.txt", {}, r"data\.sources\.0\.path: .*empty\.txt: the file is empty"),
        ("bin", {}, r"data\.sources\.0\.path: .*the directory holds no \.txt"),
        ("bin/x.bin", {}, r"data\.sources\.0\.format: .*not .*x\.bin; set text, jsonl or parquet"),
        ("bin/x.bin", {"format": "text"}, r"data\.sources\.0: .*x\.bin:3: byte 6 \(0xff\) is not"),
        ("bad.jsonl", {}, r"data\.sources\.0: .*bad\.jsonl:3: not JSON: .* at column"),
        ("field.jsonl", {}, r"field\.jsonl:2: no field 'text'; its fields are body"),
        ("null.jsonl", {}, r"null\.jsonl:1: field 'text' is no string"),
        ("list.jsonl", {}, r"list\.jsonl:1: expected an object"),
        ("half.jsonl", {}, r"half\.jsonl:1: field 'text': surrogates not allowed"),
        ("bytes.jsonl", {}, r"bytes\.jsonl:2: byte 22 \(0xe9\) is not UTF-8"),
        ("bad.parquet", {}, r"bad\.parquet: not a readable parquet file"),
        ("a.parquet", {}, r"a\.parquet: no column 'text'; its columns are body, n"),
        ("a.parquet", {"text_field": "n"}, r"column 'n' is of type int64, not string"),
        ("a.parquet", {"text_field": "body"}, r"a\.parquet: row 4: 'body' is null"),
        ("python-source:absent", {}, r"data\.sources\.0\.path: .*no package 'absent' is installed"),
        ("python-docs:x", {}, r"data\.sources\.0\.path: .*no such documents"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, path, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "x.bin").write_bytes(b"ab\ncd\n\xff\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    lines = {
        "bad": b'{"text": "a"}\n\n{"text": \n{"text": "c"}\n',
        "field": b'{"text": "a"}\n{"body": "b"}\n',
        "null": b'{"text": null}\n',
        "list": b"[1]\n",
        "half": b'{"text": "\\ud800"}\n',
        "bytes": b'{"text": "a"}\n{"text":\xe9}\n',
    }
    for name, content in lines.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    table = pa.table({"body": ["a", "b", "c", "d", None, "e"], "n": range(6)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(DataError, match=message):
        read(path, **settings)


def test_the_line_is_the_file_s_also_in_a_later_unit(tmp_path, small_units):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    lines[50] = "no JSON\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:51: not JSON"):
        read(tmp_path)


def test_a_file_that_changed_after_planning(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (source,) = resolve_sources([SourceConfig(str(tmp_path))], "data.sources")
    (tmp_path / "a.txt").write_text("another text")
    with pytest.raises(DataError, match=r"a\.txt: changed since the run was planned"):
        read_documents(source.units[0])


def compress(path, data: bytes) -> None:
    codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(data)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(tmp_path, suffix):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / f"a.jsonl{suffix}"
    compress(path, b"".join(lines[:30]))
    compress(tmp_path / f"second.jsonl{suffix}", b"".join(lines[30:]))
    other = tmp_path / f"second.jsonl{suffix}"
    path.write_bytes(path.read_bytes() + other.read_bytes())  # two frames
    other.unlink()
    compress(tmp_path / f"b.txt{suffix}", b"plain")
    (tmp_path / "c.parquet.gz").touch()
    assert read(tmp_path) == [*TEXTS, "plain"]

    lines[17] = b'{"text": 3}\n'
    compress(path, b"".join(lines))
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}:18: field 'text' is no string"):
        read(path)
    compress(path, b"".join(lines[:17]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"data\.sources\.0: .*a\.jsonl{suffix}: cannot be read"):
        read(path)


def zstd_with_checksum(data: bytes) -> bytes:
    """A zstd frame of one raw block with its content's checksum, as the zstd command writes."""
    block = (len(data) << 3 | 1).to_bytes(3, "little") + data
    checksum = (xxhash.xxh64_intdigest(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd\x24" + bytes([len(data)]) + block + checksum


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_flipped_bit_is_found_where_the_format_has_checksums(tmp_path, name):
    path, text = tmp_path / name, "one letter " * 12
    line = json.dumps({"text": text}).encode() + b"\n"
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(line, 0))  # stored: only the checksum shows the flip
    elif name.endswith("zst"):
        path.write_bytes(zstd_with_checksum(line))
    else:
        pq.write_table(
            pa.table({"text": [text]}),
            path,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
    assert read(path) == [text]
    good = path.read_bytes()
    at = good.index(b"one letter") + 5
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(DataError, match=rf"data\.sources\.0: .*{name}: cannot be read"):
        read(path)


ROWS = [{"title": f"T{i}", "body": "x" * i} for i in range(9)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_templates_and_length_filters(tmp_path, kind):
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = f"hf:{tmp_path}" if kind == "hub" else tmp_path
    rule = {"template": "{title}: {{{body}}}", "min_characters": 8, "max_characters": 10}
    assert read(path, **rule) == [f"T{i}: {{{'x' * i}}}" for i in (2, 3, 4)]


@pytest.mark.parametrize("template", ["{", "no field", "{}", "{title!r}", "{title:>5}"])
def test_bad_templates(tmp_path, template):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"data\.sources\.0\.template: "):
        read(tmp_path, template=template)


def test_a_hub_dataset_is_read_file_by_file_and_pinned(tmp_path):
    """The hub's layout in a directory: `datasets` resolves both alike."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for i in range(3):
        write_jsonl(dataset / f"train-{i:05}.jsonl", TEXTS[i * 5 : i * 5 + 5])
    write_jsonl(dataset / "test-00000.jsonl", ["held out"])
    config = SourceConfig(f"hf:{dataset}")

    def resolve():
        return resolve_sources([config], "data.sources", plans=tmp_path / "plans")[0].units

    units = resolve()
    assert len(units) == 3
    assert [text for unit in units for text in read_documents(unit)] == TEXTS[:15]
    write_jsonl(dataset / "train-00009.jsonl", ["of a later revision"])
    assert list(resolve()) == list(units)
    assert read(f"hf:{dataset}", split="test") == ["held out"]
    (dataset / "train-00001.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"train-00001\.jsonl: row 1: field 'text' is no string"):
        read_documents(units[1])
    with pytest.raises(DataError, match=r"data\.sources\.0\.split: 'dev' is none of"):
        read(f"hf:{dataset}", split="dev")
    with pytest.raises(DataError, match=r"data\.sources\.0\.path: hf:.*absent: "):
        read(f"hf:{tmp_path}/absent")


def test_a_hub_that_cannot_be_reached_is_an_error_and_never_quarantined(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("the hub cannot be reached")

    dataset = tmp_path / "dataset"
    dataset.mkdir()
    write_jsonl(dataset / "train.jsonl", TEXTS)
    (source,) = resolve_sources([SourceConfig(f"hf:{dataset}")], "data.sources")
    cache = TokenCache(tmp_path / "cache", "0" * 64, "quarantine")
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(
            DataError, match=r"data\.sources\.0: .*train\.jsonl: row 0: the hub can"
        ):
            cache._read(source.units[0])
    (dataset / "train.jsonl").write_text('{"text": 3}\n')
    documents, quarantined = cache._read(source.units[0])
    assert documents == [] and "row 0: field 'text' is no string" in quarantined
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for plans in (None, tmp_path / "plans"):
        with pytest.raises(DataError, match=r"sources\.0\.path: hf:owner/name: the hub cannot"):
            resolve_sources([SourceConfig("hf:owner/name")], "data.sources", plans=plans)
    assert not list((tmp_path / "plans").iterdir())  # neither a pin nor a lease


def test_how_files_were_cut_is_kept_and_made_again_when_damaged(tmp_path, small_units, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config, plans = SourceConfig(str(tmp_path / "a.jsonl")), tmp_path / "plans"
    (first,) = resolve_sources([config], "data.sources", plans=plans)
    (kept,) = plans.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_ranges", None)
        (second,) = resolve_sources([config], "data.sources", plans=plans)
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 8
    kept.write_bytes(content)
    (third,) = resolve_sources([config], "data.sources", plans=plans)
    assert list(first.units) == list(second.units) == list(third.units)


def test_neither_the_clock_nor_the_order_of_a_listing_matters(tmp_path, monkeypatch):
    for i, text in enumerate(TEXTS[:9]):
        (tmp_path / f"{i}.txt").write_text(text)

    def sha256():
        return resolve_sources([SourceConfig(str(tmp_path))], "x")[0].units.sha256(moved=True)

    before, walk = sha256(), os.walk
    for seconds in (0, 2**33):
        os.utime(tmp_path / "3.txt", (seconds, seconds))
        assert sha256() == before
    monkeypatch.setattr(os, "walk", lambda top: ((d, c, n[::-1]) for d, c, n in walk(top)))
    assert sha256() == before
    (tmp_path / "3.txt").write_text("longer " + TEXTS[3])
    assert sha256() != before


def test_a_table_of_many_units_is_small(tmp_path):
    """32 thousand units of sparse files: tens of bytes each, any of them made at once."""
    for i in range(8):
        with open(tmp_path / f"{i}.txt", "wb") as file:
            file.truncate(128 << 30)
    (source,) = resolve_sources([SourceConfig(str(tmp_path))], "data.sources")
    table = source.units
    assert len(table) == 8 * 4096
    assert sum(v.nbytes for v in vars(table).values() if hasattr(v, "nbytes")) < 24 * len(table)
    piece = table[4096 * 5 + 1].pieces[0]
    assert (piece.name, piece.start, piece.stop) == ("5.txt", 32 << 20, 64 << 20)
    with pytest.raises(IndexError):
        table[len(table)]
