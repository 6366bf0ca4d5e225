"""The whole pipeline: the same global sequences whatever the mesh and the interruptions."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fla_dist.config import DataConfig, SourceConfig, TokenizerConfig
from fla_dist.data import Batch, DataError, build_pipeline
from fla_dist.data.batch import IGNORED_LABEL

from .conftest import DOCUMENTS, TOKENIZER

FIELDS = ("tokens", "labels", "positions")
MESHES = [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 4, 1), (3, 1, 2), (4, 2, 1), (1, 8, 3)]


def join_slices(slices: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(s, name) for s in slices], dim=1) for name in FIELDS}


def read_sequences(open_pipeline, data, mesh, state, num_batches):
    """(global sequences, the state after them), read by all ranks of a mesh."""
    dp, sp, micro_batch_size = mesh
    rows: list[dict[str, torch.Tensor]] = []
    ranks = [
        [open_pipeline(data, (d, dp), (s, sp), micro_batch_size) for s in range(sp)]
        for d in range(dp)
    ]
    for pipeline in (p for group in ranks for p in group):
        if state is not None:
            pipeline.load_state_dict(state)
    for _ in range(num_batches):
        for group in ranks:
            whole = join_slices([next(pipeline) for pipeline in group])
            rows += [{name: whole[name][i] for name in FIELDS} for i in range(micro_batch_size)]
    states = [pipeline.state_dict() for group in ranks for pipeline in group]
    assert all(other == states[0] for other in states)
    for pipeline in (p for group in ranks for p in group):
        pipeline.close()
    return rows, json.loads(json.dumps(states[0]))


@pytest.fixture(scope="module")
def reference(data_config):
    """The first 400 sequences, read by one rank; more than two epochs."""
    pipeline = build_pipeline(
        data_config,
        TOKENIZER,
        data_parallel_rank=0,
        data_parallel_size=1,
        sequence_parallel_rank=0,
        sequence_parallel_size=1,
        micro_batch_size=1,
    )
    batches = list(islice(pipeline, 400))
    pipeline.close()
    return batches


@given(runs=st.lists(st.tuples(st.sampled_from(MESHES), st.integers(0, 9)), min_size=1, max_size=4))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_kills_and_changes_of_the_mesh_move_no_token(open_pipeline, data_config, reference, runs):
    state, rows = None, []
    for mesh, num_batches in runs:
        got, state = read_sequences(open_pipeline, data_config, mesh, state, num_batches)
        rows += got
        assert state["sequence"] == len(rows)
    for row, expected in zip(rows, reference, strict=False):
        for name in FIELDS:
            assert torch.equal(row[name], getattr(expected, name)[0])


def check_random_ranks(open_pipeline, data, reference, trials: int, seed: int) -> None:
    """Each trial: up to four runs, each on another mesh, each killed; one random rank is read."""
    random = Random(seed)
    for _ in range(trials):
        state, done = None, 0
        for _ in range(random.randint(1, 4)):
            dp, sp = random.choice([1, 2, 3, 4]), random.choice([1, 2, 4, 8])
            d, s, micro_batch_size = (
                random.randrange(dp),
                random.randrange(sp),
                random.randint(1, 3),
            )
            length = data.sequence_length // sp
            data_now = replace(data, num_workers=random.choice([1, 2]))
            pipeline = open_pipeline(data_now, (d, dp), (s, sp), micro_batch_size)
            if state is not None:
                pipeline.load_state_dict(state)
            for _ in range(random.randint(0, 6)):
                batch = next(pipeline)
                for row in range(micro_batch_size):
                    expected = reference[done + d * micro_batch_size + row]
                    for name in FIELDS:
                        whole = getattr(expected, name)[0]
                        part = whole[s * length : (s + 1) * length]
                        assert torch.equal(getattr(batch, name)[row], part)
                done += dp * micro_batch_size
            state = json.loads(json.dumps(pipeline.state_dict()))
            assert state["sequence"] == done and len(json.dumps(state)) < 4096
            pipeline.close()


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_random_kills_resumes_and_meshes(open_pipeline, data_config, packing):
    data = replace(data_config, packing=packing)
    reference = list(islice(open_pipeline(data), 300))
    check_random_ranks(open_pipeline, data, reference, trials=15, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_a_thousand_random_kills_resumes_and_meshes(open_pipeline, data_config, packing):
    data = replace(data_config, packing=packing)
    reference = list(islice(open_pipeline(data), 300))
    check_random_ranks(open_pipeline, data, reference, trials=500, seed=2)


def test_a_closed_pipeline_holds_no_file(open_pipeline, data_config):
    def open_shards() -> int:
        files = (os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())
        return sum(file.startswith(os.path.realpath(data_config.cache_dir)) for file in files)

    pipeline = open_pipeline(data_config)
    next(pipeline)
    assert open_shards() > 0
    pipeline.close()
    assert open_shards() == 0


def test_best_fit_keeps_documents_whole(open_pipeline, data_config):
    data = replace(data_config, packing="best_fit", sequence_length=2048, mask_document_ends=True)
    pipeline = open_pipeline(data)
    end = pipeline.tokenizer.end_of_document
    for _ in range(20):
        batch = next(pipeline)
        assert torch.equal(batch.labels[batch.tokens == end].unique(), torch.tensor([-100]))
        assert torch.equal(batch.doc_ids, (batch.positions == 0).cumsum(1, dtype=torch.int32))
    state = pipeline.state_dict()
    with pytest.raises(DataError, match=r"data\.sequence_length, to which best_fit"):
        open_pipeline(replace(data, sequence_length=1024)).load_state_dict(state)
    with pytest.raises(DataError, match=r"changed"):
        open_pipeline(replace(data_config, lanes=1)).load_state_dict(state)


def test_best_fit_validation_ends(open_pipeline, data_config):
    data = replace(data_config, packing="best_fit", sequence_length=512)
    pipeline = open_pipeline(data, split="validation")
    labelled = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in pipeline)
    units = range(len(pipeline._plan.sources[0].units))
    tokens = sum(pipeline._reader.count_tokens(0, unit) for unit in units)
    assert labelled == tokens - len(DOCUMENTS[24:])  # all but the documents' ends


def test_quarantine_empties_a_unit_and_moves_no_other(open_pipeline, own_data_config, reference):
    """The sequences up to the bad unit are unchanged, and so is the order of the other units."""
    data = replace(own_data_config, sources=own_data_config.sources[1:])
    healthy = open_pipeline(data)
    before = list(healthy._order.upcoming_units(0))
    piece = healthy._plan.sources[0].units[before[-1]].pieces[0]
    healthy.close()
    shutil.rmtree(data.cache_dir)
    Path(piece.path).write_bytes(b"\xff" * piece.size)
    broken = open_pipeline(data)
    with pytest.raises(DataError, match=r"byte 0 \(0xff\) is not UTF-8"):
        for _ in range(400):
            next(broken)
    lenient = replace(data, on_bad_source="quarantine")
    pipeline = open_pipeline(lenient)
    assert list(pipeline._order.upcoming_units(0)) == before
    end = pipeline.tokenizer.end_of_document
    num_documents = sum(int((next(pipeline).tokens == end).sum()) for _ in range(300))
    assert num_documents > 12 and pipeline.quarantined_units == 1
    strict = open_pipeline(data)
    assert strict._plan.sha256 == pipeline._plan.sha256
    with pytest.raises(DataError, match=r"byte 0 \(0xff\) is not UTF-8"):
        for _ in range(400):
            next(strict)


def test_a_slice_s_document_ids_count_its_own_starts(open_pipeline, data_config):
    slices = [open_pipeline(data_config, sp=(rank, 4), micro_batch_size=5) for rank in range(4)]
    for _ in range(6):
        for rank, batch in enumerate([next(pipeline) for pipeline in slices]):
            assert batch.tokens.shape == (5, 16)
            assert torch.equal(batch.doc_ids, (batch.positions == 0).cumsum(1, dtype=torch.int32))
            assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
            assert (batch.positions.dtype, batch.doc_ids.dtype) == (torch.int32, torch.int32)
            assert rank > 0 or bool((batch.doc_ids[:, 0] == 1).all())


def test_an_epoch_holds_every_document_once(open_pipeline, data_config):
    """Decoded from the batches, the text is that of the files."""
    data = replace(data_config, sources=data_config.sources[:1], lanes=1)
    pipeline = open_pipeline(data)
    end = pipeline.tokenizer.end_of_document
    texts: list[str] = []
    tokens: list[int] = []
    while len(texts) < 48:
        for token in next(pipeline).tokens[0].tolist():
            tokens.append(token)
            if token == end:
                texts.append(pipeline.tokenizer.decode(tokens[:-1]))
                tokens = []
    assert Counter(texts[:24]) == Counter(texts[24:48]) == Counter(DOCUMENTS[:24])
    assert texts[:24] != texts[24:48]


def test_labels_and_masks(open_pipeline, data_config):
    plain = open_pipeline(replace(data_config, mask_document_ends=False, packing="none"))
    masked = open_pipeline(data_config)
    end = masked.tokenizer.end_of_document
    for _ in range(50):
        a, b = next(plain), next(masked)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.labels[:, :-1], a.tokens[:, 1:])
        assert torch.equal(b.labels == IGNORED_LABEL, b.tokens == end)
        assert torch.equal(torch.where(b.labels == IGNORED_LABEL, a.labels, b.labels), a.labels)
        assert a.positions.tolist() == [list(range(64))]
        starts = torch.nn.functional.pad(b.tokens[:, :-1] == end, (1, 0), value=True)
        assert torch.equal(b.positions == 0, starts)


def test_the_order_does_not_depend_on_workers_or_place(open_pipeline, own_data_config, reference):
    pipeline = open_pipeline(replace(own_data_config, num_workers=2))
    for expected, batch in zip(reference[:40], pipeline, strict=False):
        assert torch.equal(batch.tokens, expected.tokens)


def check_random_lengths(open_pipeline, data, trials: int, seed: int) -> None:
    """As check_random_ranks, and each run has another sequence length: of one lane, the tokens are
    one stream whatever its cuts."""
    random = Random(seed)
    data = replace(data, sources=data.sources[:1], lanes=1)
    whole = open_pipeline(replace(data, sequence_length=1024))
    stream = torch.cat([next(whole).tokens[0] for _ in range(40)])
    for _ in range(trials):
        state, done = None, 0
        for _ in range(random.randint(2, 4)):
            dp, sp = random.choice([1, 2, 3]), random.choice([1, 2, 4])
            d, s, micro_batch_size = (
                random.randrange(dp),
                random.randrange(sp),
                random.randint(1, 2),
            )
            length = random.choice([32, 60, 256, 512])
            pipeline = open_pipeline(
                replace(data, sequence_length=length), (d, dp), (s, sp), micro_batch_size
            )
            if state is not None:
                pipeline.load_state_dict(state)
            part = length // sp
            for _ in range(random.randint(0, 3)):
                batch = next(pipeline)
                for row in range(micro_batch_size):
                    start = done + (d * micro_batch_size + row) * length + s * part
                    assert torch.equal(batch.tokens[row], stream[start : start + part])
                    following = stream[start + 1 : start + part + 1]
                    labelled = batch.labels[row] != IGNORED_LABEL
                    assert torch.equal(batch.labels[row][labelled], following[labelled])
                done += dp * micro_batch_size * length
            state = json.loads(json.dumps(pipeline.state_dict()))
            pipeline.close()


def test_another_sequence_length_goes_on_at_the_next_token(open_pipeline, data_config):
    check_random_lengths(open_pipeline, data_config, trials=8, seed=3)


@pytest.mark.slow
def test_many_sequence_lengths_go_on_at_the_next_token(open_pipeline, data_config):
    check_random_lengths(open_pipeline, data_config, trials=200, seed=4)


def test_sources_keep_their_weights(open_pipeline, data_config):
    pipeline = open_pipeline(data_config)
    for _ in range(100):
        next(pipeline)
    assert [source["tokens"] for source in pipeline.state_dict()["sources"]] == [4800, 1600]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lanes": 2}, r"data\.lanes changed \(then 3, now 2\)"),
        ({"seed": 6}, r"data\.seed changed"),
        ({"sources": (SourceConfig("python-docs:"),)}, r"data\.sources: the files.* changed"),
    ],
)
def test_a_state_of_other_data_is_refused(open_pipeline, data_config, change, reason):
    state = open_pipeline(data_config).state_dict()
    with pytest.raises(DataError, match=reason):
        open_pipeline(replace(data_config, **change)).load_state_dict(state)


def test_validation_has_every_sequence_once_on_any_mesh(open_pipeline, data_config):
    expected = [batch.tokens[0] for batch in open_pipeline(data_config, split="validation")]
    assert len(expected) > 20
    pipelines = [
        open_pipeline(data_config, (rank, 3), micro_batch_size=2, split="validation")
        for rank in range(3)
    ]
    for _ in range(2):  # it starts again
        batches = [list(pipeline) for pipeline in pipelines]
        rows = [
            (batch.tokens[i], batch.labels[i])
            for step in zip(*batches, strict=True)
            for batch in step
            for i in range(2)
        ]
        full, padded = rows[: len(expected)], rows[len(expected) :]
        assert all(torch.equal(a, b) for (a, _), b in zip(full, expected, strict=True))
        assert all(bool((labels == IGNORED_LABEL).all()) for _, labels in padded)
        assert len(padded) < 6


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "record", "garbage"])
def test_damage_in_the_cache_is_repaired(open_pipeline, own_data_config, reference, damage):
    first = open_pipeline(own_data_config)
    for _ in range(200):  # every unit is built
        next(first)
    first.close()
    cache = Path(own_data_config.cache_dir)
    for path in sorted((cache / ("units" if damage == "record" else "shards")).iterdir()):
        content = bytearray(path.read_bytes())
        if damage in ("flipped bit", "record"):
            content[len(content) * 2 // 3] ^= 4
        elif damage == "truncated":
            content = content[:-5]
        elif damage == "garbage":
            content = bytearray(b"garbage")
        path.write_bytes(content)
        if damage == "missing":
            path.unlink()
    again = open_pipeline(own_data_config)
    for expected in reference[:200]:
        assert torch.equal(next(again).tokens, expected.tokens)


def test_damage_while_reading_is_repaired(open_pipeline, own_data_config, reference):
    """Two ranks see it; neither loses a token."""
    pipelines = [open_pipeline(own_data_config) for _ in range(2)]
    for expected in reference[:60]:
        for pipeline in pipelines:
            assert torch.equal(next(pipeline).tokens, expected.tokens)
    shutil.rmtree(Path(own_data_config.cache_dir) / "shards")
    for expected in reference[60:200]:
        for pipeline in pipelines:
            assert torch.equal(next(pipeline).tokens, expected.tokens)


def test_a_bad_line_is_raised_by_every_rank_where_it_is_needed(open_pipeline, own_data_config):
    path = Path(own_data_config.sources[0].path)
    lines = path.read_text().splitlines(keepends=True)
    lines[20] = '{"body": 3}\n'
    path.write_text("".join(lines))
    messages, steps = set(), set()
    for pipeline in [open_pipeline(own_data_config, (rank, 2)) for rank in range(2)]:
        with pytest.raises(DataError, match=r"lines\.jsonl:21: field 'body' is no string") as error:
            for step in range(500):
                steps.add(step)
                next(pipeline)
        with pytest.raises(DataError):
            next(pipeline)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_a_source_smaller_than_a_sequence(open_pipeline, own_data_config):
    for split in ("train", "validation"):
        small = (SourceConfig(own_data_config.sources[1].path + "/00.txt"),)
        data = replace(
            own_data_config, sources=small, validation_sources=small, sequence_length=8192
        )
        with pytest.raises(DataError, match=r"sources\.0: has \d+ tokens, too few for one seq"):
            next(open_pipeline(data, split=split))


def test_no_validation_sources(open_pipeline, data_config):
    with pytest.raises(DataError, match=r"data\.validation_sources: names no source"):
        open_pipeline(replace(data_config, validation_sources=()), split="validation")


def test_slices_may_differ_by_a_token(open_pipeline, data_config):
    whole = next(open_pipeline(data_config, micro_batch_size=2))
    parts = [next(open_pipeline(data_config, sp=(r, 5), micro_batch_size=2)) for r in range(5)]
    for part in parts:
        assert part.slice_lengths == (13, 13, 13, 13, 12)
    for name in ("tokens", "labels", "positions"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(whole, name))


def test_more_ranks_than_tokens(open_pipeline, data_config):
    with pytest.raises(DataError, match=r"data\.sequence_length: 4 is less than a token for each"):
        open_pipeline(replace(data_config, sequence_length=4), sp=(0, 5))


def test_every_unit_is_built_in_the_background(open_pipeline, own_data_config):
    pipeline = open_pipeline(own_data_config)
    next(pipeline)
    pipeline._builder._thread.join()
    assert all(map(pipeline._plan.cache.is_built, pipeline._plan.units()))


def test_closing_amid_the_building_does_not_hang(open_pipeline, own_data_config):
    pipeline = open_pipeline(own_data_config)
    pipeline.close()
    pipeline.close()


def test_batches_move(open_pipeline, data_config):
    batch = next(open_pipeline(data_config)).to("cpu", non_blocking=True)
    assert isinstance(batch, Batch)


def test_tokenizer_larger_than_the_model(open_pipeline, data_config):
    tokenizer = open_pipeline(data_config).tokenizer
    tokenizer.require_vocabulary(512)
    with pytest.raises(DataError, match=r"512 tokens, more than model\.vocab_size 300"):
        tokenizer.require_vocabulary(300)


def test_a_missing_tokenizer(data_config: DataConfig, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.path: .*nowhere"):
        build_pipeline(
            data_config,
            TokenizerConfig(path=str(tmp_path / "nowhere")),
            data_parallel_rank=0,
            data_parallel_size=1,
            sequence_parallel_rank=0,
            sequence_parallel_size=1,
            micro_batch_size=1,
        )
