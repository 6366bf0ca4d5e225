"""Windowed best-fit packing: whole documents, each once, in sequences that are full."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dist.data import best_fit
from fla_dist.data.best_fit import BestFitOrder
from fla_dist.data.order import Exhausted, SourceOrder, Span
from fla_dist.data.packing import Row, ShuffledShard, pack_documents

from .test_packing import FakeShard

corpora = st.lists(  # a source's units' documents' lengths
    st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=5
).filter(lambda units: any(map(sum, units)))


def make_order(sources: list[list[list[int]]], **options) -> BestFitOrder:
    shards: dict = {}

    def begins(source: int, unit: int, key: int) -> np.ndarray:
        if (source, unit, key) not in shards:
            fake = FakeShard(sources[source][unit], 0)
            shards[source, unit, key] = ShuffledShard(fake, key)  # type: ignore[arg-type]
        return shards[source, unit, key].begins

    return BestFitOrder(
        [SourceOrder(len(units), 1.0) for units in sources],
        seed=3,
        count_tokens=lambda source, unit: sum(sources[source][unit]),
        document_begins=begins,
        **options,
    )


@given(units=corpora, length=st.integers(1, 30), window=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_token_once_an_epoch_and_short_documents_whole(units, length, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "WINDOW_SEQUENCES", window)
        order = make_order([units], epochs=1)
        spans: list[Span] = []
        with pytest.raises(Exhausted):
            while True:
                sequence = order.next_sequence(length)
                assert 0 < sum(span.stop - span.start for span in sequence) <= length
                spans += sequence
    tokens = [(span.unit, i) for span in spans for i in range(span.start, span.stop)]
    assert sorted(tokens) == [
        (u, i) for u, lengths in enumerate(units) for i in range(sum(lengths))
    ]
    whole = sorted(span.stop - span.start for span in spans if span.stop - span.start < length)
    parts = [size % length for lengths in units for size in lengths]
    assert whole == sorted(part for part in parts if part)


@given(
    sources=st.lists(corpora, min_size=1, max_size=2),
    length=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_resuming_anywhere_changes_nothing(sources, length, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "WINDOW_SEQUENCES", 5)
        order = make_order(sources)
        expected = [order.next_sequence(length) for _ in range(40)]
        resumed, got = make_order(sources), []
        bounds = [0, *sorted(cuts), 40]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            got += [resumed.next_sequence(length) for _ in range(begin, end)]
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = make_order(sources)
            resumed.load_state_dict(state)
        assert got == expected and resumed.state_dict() == order.state_dict()


def test_windows_of_real_lengths_are_full():
    lengths = np.random.default_rng(0).lognormal(6.5, 1.3, (4, 4000)).astype(int) + 1
    order = make_order([lengths.tolist()])
    count = 2 * best_fit.WINDOW_SEQUENCES
    filled = sum(s.stop - s.start for _ in range(count) for s in order.next_sequence(2048))
    assert filled / (count * 2048) > 0.99


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cut=st.integers(0, 8),
    padding=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_slices_are_those_of_the_whole_sequence(lengths, cut, padding, data):
    """Documents in any order, the first one's start and the last one's end cut off."""
    shard = ShuffledShard(FakeShard(lengths, 100), 11)  # type: ignore[arg-type]
    stream = np.empty(sum(lengths), np.int64)
    shard.read(0, sum(lengths), stream)
    pieces = list(zip(shard.begins[:-1].tolist(), shard.begins[1:].tolist(), strict=True))
    pieces = data.draw(st.permutations(pieces))
    spans = [Span(0, 0, 11, a, max(a + 1, b - cut)) for a, b in pieces]
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for span, (_, end) in zip(spans, pieces, strict=True):
        for i in range(span.start, span.stop):
            tokens.append(int(stream[i]))
            labels.append(int(stream[i + 1]) if i + 1 < end else -100)
            positions.append(i - span.start)
    length = len(tokens) + padding
    tokens += [0] * padding
    labels += [-100] * padding
    positions += range(padding)
    bounds = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
    rows = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        rows.append(Row.empty(stop - start))
        pack_documents(spans, [shard] * len(spans), rows[-1], start=start)
        assert np.array_equal(rows[-1].doc_ids, np.cumsum(rows[-1].positions == 0))
    expected = SimpleNamespace(tokens=tokens, labels=labels, positions=positions)
    for name in ("tokens", "labels", "positions"):
        assert np.concatenate([getattr(r, name) for r in rows]).tolist() == getattr(expected, name)
