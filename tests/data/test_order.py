"""The order of sequences: a function of seed and plan, exact over resumption."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dist.data.order import Exhausted, Order, SourceOrder, SourceTooSmall, Span, permute

plans = st.lists(  # sources of units of some tokens each, some of them empty
    st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 16),
    min_size=1,
    max_size=3,
)


def make_order(sizes: list[list[int]], lanes: int, seed: int = 0, **options) -> Order:
    weights = options.pop("weights", range(1, len(sizes) + 1))
    return Order(
        [SourceOrder(len(units), weight) for units, weight in zip(sizes, weights, strict=True)],
        lanes=lanes,
        seed=seed,
        count_tokens=lambda source, unit: sizes[source][unit],
        **options,
    )


def tokens_of(spans: list[Span]) -> list[tuple[int, int, int, int]]:
    return [(s.source, s.unit, s.key, i) for s in spans for i in range(s.start, s.stop)]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_hits_every_index_once(size, key):
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_of_one_index_is_that_of_all():
    image = permute(np.arange(1000), 1000, 7)
    assert [int(permute(np.array([i]), 1000, 7)[0]) for i in range(50)] == image[:50].tolist()


def test_permutations_mix():
    """Images neither follow the index nor another key's images."""
    size = 4096
    first, second = (permute(np.arange(size), size, key) for key in (1, 2))
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.06
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert (np.diff(first) == 1).mean() < 0.005


@given(plan=plans, lanes=st.integers(1, 5), length=st.integers(1, 15), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_sequences_have_their_length_and_lanes_run_on(plan, lanes, length, seed):
    """A lane's next sequence starts with the token that labelled the end of the one before."""
    order = make_order(plan, lanes, seed)
    last: dict[tuple[int, int], tuple] = {}
    counts = [0] * len(plan)
    for _ in range(60):
        tokens = tokens_of(order.next_sequence(length))
        assert len(tokens) == length + 1
        source = tokens[0][0]
        lane = (source, counts[source] % min(lanes, len(plan[source])))
        counts[source] += 1
        assert last.get(lane, tokens[0]) == tokens[0]
        last[lane] = tokens[-1]


@given(plan=plans, lanes=st.integers(1, 5), length=st.integers(1, 15), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_no_token_is_lost_or_repeated(plan, lanes, length, seed):
    """However lanes are dealt to, each epoch's tokens are delivered once each, without gaps."""
    order = make_order(plan, lanes, seed)
    seen: dict[tuple[int, int, int], list[int]] = {}
    for _ in range(80):
        for source, unit, key, index in tokens_of(order.next_sequence(length))[:-1]:
            seen.setdefault((source, unit, key), []).append(index)
    open_units = 0
    for (source, unit, _), indices in seen.items():
        assert indices == list(range(len(indices)))
        open_units += len(indices) < plan[source][unit]
    assert open_units <= sum(min(lanes, len(units)) for units in plan)


def test_an_epoch_ends_before_the_next_one_starts():
    order = make_order([[10] * 7], lanes=3)
    keys = [span.key for _ in range(14) for span in order.next_sequence(5)]
    first_epoch = list(dict.fromkeys(keys))[:7]
    assert {order._find_unit(0, n)[1] for n in range(7)} == set(first_epoch)
    units = [order._find_unit(0, n)[0] for n in range(14)]
    assert sorted(units[:7]) == sorted(units[7:]) == list(range(7))
    assert units[:7] != units[7:]


@given(
    plan=plans,
    lanes=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 15), min_size=2, max_size=40),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_resuming_anywhere_changes_nothing(plan, lanes, lengths, data):
    """Also where the sequence length changes on the way: it goes on at the next token."""
    order = make_order(plan, lanes)
    expected = [order.next_sequence(length) for length in lengths]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    resumed, got = make_order(plan, lanes), []
    for begin, end in zip([0, *cuts], [*cuts, len(lengths)], strict=True):
        got += [resumed.next_sequence(length) for length in lengths[begin:end]]
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = make_order(plan, lanes)
        resumed.load_state_dict(state)
    assert got == expected
    assert resumed.state_dict() == order.state_dict()


@given(weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5), count=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_blend_keeps_to_the_weights(weights, count):
    """No source is ever a sequence or more from its share."""
    order = make_order([[50] * 3] * len(weights), lanes=2, weights=weights)
    for n in range(1, count + 1):
        order.next_sequence(10)
        for share, weight in zip(order.shares(), weights, strict=True):
            assert abs(share * n - weight / sum(weights) * n) < len(weights) ** 0.5 + 1e-6


@given(plan=plans, lanes=st.integers(1, 5), steps=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_upcoming_units_are_all_units_in_order_of_need(plan, lanes, steps):
    order = make_order(plan, lanes)
    for _ in range(steps):
        order.next_sequence(7)
    upcoming = [list(order.upcoming_units(source)) for source in range(len(plan))]
    assert [sorted(units) for units in upcoming] == [list(range(len(sizes))) for sizes in plan]
    for source, units in enumerate(upcoming):
        held = [order._find_unit(source, n)[0] for n, _ in order._lanes[source]]
        assert set(units[: len(set(held))]) == set(held)


def test_only_reached_units_are_asked_for():
    asked = set()

    def count_tokens(source: int, unit: int) -> int:
        asked.add(unit)
        return 100

    order = Order([SourceOrder(10**9, 1.0)], lanes=4, seed=0, count_tokens=count_tokens)
    for _ in range(40):
        order.next_sequence(20)
    assert len(asked) <= 12  # 8 units of 100 tokens, and those that the lanes stand in


def test_state_stays_small():
    order = make_order([[2**24] * 100] * 2, lanes=8)
    for _ in range(100):
        order.next_sequence(2**20 - 1)
    assert len(json.dumps(order.state_dict())) < 700


def test_a_limited_order_delivers_its_epochs_and_ends():
    order = make_order([[30, 0, 25, 45]], lanes=1, epochs=1)
    tokens = []
    with pytest.raises(Exhausted):
        while True:
            tokens += tokens_of(order.next_sequence(9))[:-1]
    assert len(tokens) == len(set(tokens)) == 99


@pytest.mark.parametrize("sizes", [[10, 0, 7], [16], [1] * 16, [0]])
def test_source_smaller_than_one_sequence(sizes):
    order = make_order([[50, 50], sizes], lanes=4)
    with pytest.raises(SourceTooSmall) as caught:
        for _ in range(5):
            order.next_sequence(17)
    assert (caught.value.source, caught.value.tokens) == (1, sum(sizes))
