"""What launch/prepare_data.py does: build, verify and describe a plan's cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from fla_dist.config import DataConfig
from fla_dist.data.errors import DamagedShardError
from fla_dist.data.order import Exhausted
from fla_dist.data.packing import Row, ShuffledShard, pack_documents, pack_stream
from fla_dist.data.pipeline import make_order
from fla_dist.data.plan import Plan, Split
from fla_dist.data.shard import Shard

SEQUENCES_OF_A_BLEND = 1000
PREVIEW_TOKENS = 12


def build(plan: Plan, num_workers: int) -> None:
    """Builds every unit, with a progress bar.

    Raises:
        DataError: naming everything that could not be built; the rest is built.
    """
    builder = plan.make_builder(plan.units, num_workers)
    name = plan.sources[0].key.rpartition(".")[0]
    with tqdm(total=plan.num_units(), unit="unit", desc=name) as bar:

        def on_progress(done: int) -> None:
            bar.update(done - bar.n)

        try:
            builder.build_all(on_progress)
        finally:
            builder.close()


def quarantined(plan: Plan) -> list[str]:
    """Why the units that count as empty could not be read."""
    records = map(plan.cache.find, plan.units())
    return [record.quarantined for record in records if record and record.quarantined]


def verify(plan: Plan) -> list[str]:
    """Reads every byte; what is damaged or missing. A damaged shard is removed, to be rebuilt."""
    problems = []
    for unit in plan.units():
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
    shards = [[plan.cache.open(unit) for unit in source.units] for source in plan.sources]
    yield f"plan {plan.sha256[:16]}, tokenizer {plan.tokenizer.path}"
    yield f"  {plan.tokenizer.vocab_size} tokens, end of document {plan.tokenizer.end_of_document}"
    for source, parts in zip(plan.sources, shards, strict=True):
        yield from _describe_source(source.key, source.weight, parts)

    def shuffled(source: int, unit: int, key: int) -> ShuffledShard:
        return ShuffledShard(shards[source][unit], key)

    order = make_order(
        plan,
        data,
        split,
        count_tokens=lambda source, unit: shards[source][unit].header.tokens,
        document_begins=lambda *unit: shuffled(*unit).begins,
    )
    length = data.sequence_length
    spans = order.next_sequence(length)
    with contextlib.suppress(Exhausted):
        while order.sequence < SEQUENCES_OF_A_BLEND:
            order.next_sequence(length)
    shares = ", ".join(f"{share:.2%}" for share in order.shares())
    yield f"blend of the first {order.sequence} sequences, by source: {shares}"

    streams = [shuffled(span.source, span.unit, span.key) for span in spans]
    sequence = Row.empty(length)
    if data.packing == "best_fit":
        pack_documents(spans, streams, sequence, start=0)
    else:
        mask = data.mask_document_ends
        pack_stream(
            spans, streams, sequence, start=0, restart_positions=True, mask_document_ends=mask
        )
    begins = np.flatnonzero(sequence.positions == 0).tolist()
    yield f"first sequence: {data.sequence_length} tokens, {len(begins)} documents"
    for begin, end in zip(begins, [*begins[1:], data.sequence_length], strict=True):
        preview = plan.tokenizer.decode(sequence.tokens[begin:end][:PREVIEW_TOKENS].tolist())
        yield f"  [{begin}, {end}) {preview!r}"


def _describe_source(key: str, weight: float, shards: list[Shard]) -> Iterator[str]:
    lengths = np.concatenate([np.diff(shard.begins) for shard in shards])
    yield (
        f"{key}: weight {weight:g}, {len(shards)} units, {len(lengths):,} documents, "
        f"{int(lengths.sum()):,} tokens"
    )
    if not len(lengths):
        return
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    for exponent, count in enumerate(bins.tolist()):
        if count:
            bar = "#" * round(40 * count / int(bins.max()))
            yield f"  up to {1 << exponent:>9,} tokens {count:>9,} documents {bar}"
