"""Packed slices against a token-by-token account of what they should be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dist.data.order import Span, permute
from fla_dist.data.packing import Row, ShuffledShard, pack_padding, pack_stream


class FakeShard:
    """A unit's documents in memory, with what ShuffledShard needs of a Shard."""

    def __init__(self, lengths: list[int], first_token: int):
        self.header = SimpleNamespace(documents=len(lengths), dtype="uint32")
        self.begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = np.arange(first_token, first_token + sum(lengths), dtype=np.uint32)

    def read(self, starts: np.ndarray, bounds: np.ndarray, out: np.ndarray) -> None:
        assert len(starts) == len(bounds) - 1 and bounds[-1] == len(out)
        for start, begin, end in zip(starts, bounds, bounds[1:], strict=False):
            assert begin <= end and start + end - begin <= len(self.tokens)
            out[begin:end] = self.tokens[start : start + end - begin]


@st.composite
def sequences(draw):
    """(spans, shards, the sequence's (token, whether a document starts), length)."""
    spans, shards, expected = [], [], []
    for unit in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
        key = draw(st.integers(0, 2**64 - 1))
        fake = FakeShard(lengths, 1000 * unit)
        order = permute(np.arange(len(lengths)), len(lengths), key)
        stream = [
            (int(fake.tokens[fake.begins[d] + i]), i == 0) for d in order for i in range(lengths[d])
        ]
        start = draw(st.integers(0, len(stream) - 1)) if unit == 0 else 0
        stop = len(stream)
        spans.append(Span(0, unit, key, start, stop))
        shards.append(ShuffledShard(fake, key))  # type: ignore[arg-type]
        expected += stream[start:stop]
    if len(expected) < 2:
        expected += [(9999, True)]
        shards.append(ShuffledShard(FakeShard([1], 9999), 0))  # type: ignore[arg-type]
        spans.append(Span(0, 3, 0, 0, 1))
    return spans, shards, expected, len(expected) - 1


def naive(expected, length, packing, mask):
    tokens = [token for token, _ in expected[:length]]
    labels = [-100 if mask and starts else token for token, starts in expected[1 : length + 1]]
    positions: list[int] = []
    for t in range(length):
        restarts = t == 0 or (packing == "documents" and expected[t][1])
        positions.append(0 if restarts else positions[-1] + 1)
    return tokens, labels, positions


@given(
    sequence=sequences(),
    packing=st.sampled_from(["documents", "none"]),
    mask=st.booleans(),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_slices_are_those_of_the_whole_sequence(sequence, packing, mask, data):
    spans, shards, expected, length = sequence
    tokens, labels, positions = naive(expected, length, packing, mask)
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
    slices = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        slices.append(Row.empty(stop - start))
        pack_stream(
            spans,
            shards,
            slices[-1],
            start=start,
            restart_positions=packing == "documents",
            mask_document_ends=mask,
        )
    assert np.concatenate([s.tokens for s in slices]).tolist() == tokens
    assert np.concatenate([s.labels for s in slices]).tolist() == labels
    assert np.concatenate([s.positions for s in slices]).tolist() == positions
    for s in slices:
        assert np.array_equal(s.doc_ids, np.cumsum(s.positions == 0))
        assert (s.tokens.dtype, s.labels.dtype) == (np.int64, np.int64)
        assert (s.positions.dtype, s.doc_ids.dtype) == (np.int32, np.int32)
    assert slices[0].doc_ids[0] == 1


def test_padding_has_no_labels_and_continues_over_slices():
    first, second = Row.empty(4), Row.empty(4)
    pack_padding(first, 0)
    pack_padding(second, 4)
    assert first.positions.tolist() + second.positions.tolist() == list(range(8))
    assert first.doc_ids.tolist() == [1] * 4 and second.doc_ids.tolist() == [0] * 4
    assert set(first.labels) == {-100}
