"""What launch/prepare_data.py does: build, verify and describe a plan's cache."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from fla_dist.config import DataConfig, SourceConfig
from fla_dist.data.batch import IGNORED_LABEL
from fla_dist.data.errors import DamagedShardError
from fla_dist.data.order import Exhausted, Order, Span
from fla_dist.data.packing import Row, ShuffledShard, pack_documents, pack_stream
from fla_dist.data.pipeline import make_order
from fla_dist.data.plan import Plan, Split
from fla_dist.data.sources import Source

SEQUENCES_OF_A_BLEND = 1000
PREVIEW_TOKENS = 12
OPEN_STREAMS = 16


def build(plan: Plan, num_workers: int) -> None:
    """Builds every unit, with a progress bar.

    Raises:
        DataError: naming everything that could not be built; the rest is built.
    """
    builder = plan.make_builder(plan.units, num_workers)
    with tqdm(total=plan.num_units(), unit="unit", desc=_name(plan)) as bar:

        def on_progress(done: int) -> None:
            bar.update(done - bar.n)

        try:
            builder.build_all(on_progress)
        finally:
            builder.close()


def summarize(plan: Plan) -> str:
    """What is in the cache of a plan that is built."""
    records = [record for record in map(plan.cache.find, plan.units()) if record]
    return (
        f"{_name(plan)}: {len(records):,} units, {sum(r.documents for r in records):,} documents, "
        f"{sum(r.tokens for r in records):,} tokens"
    )


def quarantined(plan: Plan) -> list[str]:
    """Why the units that count as empty could not be read."""
    records = map(plan.cache.find, plan.units())
    return [record.quarantined for record in records if record and record.quarantined]


def verify(plan: Plan) -> list[str]:
    """Reads every byte; what is damaged or missing. A damaged shard is removed, to be rebuilt."""
    problems = []
    for unit in tqdm(plan.units(), total=plan.num_units(), unit="unit", desc=_name(plan)):
        try:
            plan.cache.open(unit).verify()
        except DamagedShardError as error:
            problems.append(f"{unit.key}: {error}")
            plan.cache.discard_if_damaged(unit)
    return problems


def describe(plan: Plan, data: DataConfig, split: Split) -> Iterator[str]:
    """The sources, their documents' lengths, the blend, and the first sequence; of a built cache.

    Raises:
        DamagedShardError: a unit is not built, or its shard is damaged.
    """
    tokenizer = plan.tokenizer
    yield f"{_name(plan)}: plan {plan.sha256[:16]}, {plan.num_units():,} units"
    yield (
        f"tokenizer {tokenizer.path}: {tokenizer.vocab_size:,} tokens, end of document "
        + ("none" if tokenizer.end_of_document is None else f"{tokenizer.end_of_document}")
    )
    configs = data.validation_sources if split == "validation" else data.sources
    totals = []
    for source, config in zip(plan.sources, configs, strict=True):
        lengths = Lengths.of(plan, source)
        totals.append(lengths.tokens)
        yield from _describe_source(source, config, lengths, data.sequence_length)

    @functools.lru_cache(maxsize=OPEN_STREAMS)
    def stream(source: int, unit: int, key: int) -> ShuffledShard:
        return ShuffledShard(plan.cache.open(plan.sources[source].units[unit]), key)

    def count_tokens(source: int, unit: int) -> int:
        return plan.cache.open(plan.sources[source].units[unit]).header.tokens

    order = make_order(
        plan,
        data,
        split,
        count_tokens=functools.lru_cache(maxsize=None)(count_tokens),
        document_begins=lambda *unit: stream(*unit).begins,
    )
    spans = order.next_sequence(data.sequence_length)
    with contextlib.suppress(Exhausted):
        while order.sequence < SEQUENCES_OF_A_BLEND:
            order.next_sequence(data.sequence_length)
    yield from _describe_blend(plan, order, totals)
    streams = [stream(span.source, span.unit, span.key) for span in spans]
    yield from _describe_sequence(plan, data, spans, streams)


@dataclass
class Lengths:
    """A source's documents by length.

    Attributes:
        documents, tokens: of all of them.
        by_exponent: [65, 2] documents, and tokens in them, of up to 2^i tokens each.
        longest: tokens.
    """

    documents: int
    tokens: int
    by_exponent: np.ndarray
    longest: int

    @staticmethod
    def of(plan: Plan, source: Source) -> Lengths:
        table, longest = np.zeros((65, 2), np.int64), 0
        for unit in source.units:
            lengths = np.diff(plan.cache.open(unit).begins)
            exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
            np.add.at(table[:, 0], exponents, 1)
            np.add.at(table[:, 1], exponents, lengths)
            longest = max(longest, int(lengths.max(initial=0)))
        documents, tokens = table.sum(0).tolist()
        return Lengths(documents, tokens, table, longest)


def _name(plan: Plan) -> str:
    return plan.sources[0].key.rpartition(".")[0]


def _describe_source(
    source: Source, config: SourceConfig, lengths: Lengths, sequence_length: int
) -> Iterator[str]:
    yield ""
    yield (
        f"{source.key} {config.path}: weight {source.weight:g}, {len(source.units):,} units, "
        f"{lengths.documents:,} documents, {lengths.tokens:,} tokens"
    )
    if not lengths.documents:
        return
    yield (
        f"  mean length {lengths.tokens / lengths.documents:,.0f}, longest {lengths.longest:,}, "
        f"a sequence {sequence_length:,}"
    )
    yield f"  {'tokens up to':>14} {'documents':>14} {'of tokens':>10}"
    most = int(lengths.by_exponent[:, 0].max())
    for exponent, (documents, tokens) in enumerate(lengths.by_exponent.tolist()):
        if documents:
            share = tokens / max(1, lengths.tokens)
            bar = "#" * max(1, round(40 * documents / most))
            yield f"  {1 << exponent:>14,} {documents:>14,} {share:>10.1%} {bar}"


def _describe_blend(plan: Plan, order: Order, totals: list[int]) -> Iterator[str]:
    """The real shares of the sequences that `order` has passed."""
    yield ""
    yield f"blend of the first {order.sequence:,} sequences"
    weights = sum(source.weight for source in plan.sources)
    for source, share, tokens in zip(plan.sources, order.shares(), totals, strict=True):
        asked = source.weight / weights
        yield (
            f"  {source.key}: {share:.2%}, asked {asked:.2%}; "
            f"its epoch lasts {tokens / asked:,.0f} tokens of the run"
        )


def _describe_sequence(
    plan: Plan, data: DataConfig, spans: list[Span], streams: list[ShuffledShard]
) -> Iterator[str]:
    """The first sequence, with its documents' borders."""
    length = data.sequence_length
    row = Row.empty(length)
    filled = length
    if data.packing == "best_fit":
        pack_documents(spans, streams, row, start=0)
        filled = sum(span.stop - span.start for span in spans)
    else:
        mask = data.mask_document_ends
        pack_stream(spans, streams, row, start=0, restart_positions=True, mask_document_ends=mask)
    begins = np.flatnonzero(row.positions[:filled] == 0).tolist()
    labelled = int((row.labels != IGNORED_LABEL).sum())
    yield ""
    yield f"first sequence: {length:,} tokens, {labelled:,} labels; its documents:"
    for begin, end in zip(begins, [*begins[1:], filled], strict=True):
        preview = plan.tokenizer.decode(row.tokens[begin:end][:PREVIEW_TOKENS].tolist())
        yield f"  [{begin}, {end}) {preview!r}"
    if filled < length:
        yield f"  [{filled}, {length}) padding"
