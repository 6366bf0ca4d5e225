"""build_pipeline: sources, cache, order and packing behind one iterator."""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch

from fla_dist.config import DataConfig, TokenizerConfig
from fla_dist.data.batch import Batch
from fla_dist.data.best_fit import BestFitOrder
from fla_dist.data.builder import Builder, Closed
from fla_dist.data.errors import DamagedShardError, DataError
from fla_dist.data.order import Exhausted, Order, SourceOrder, SourceTooSmall, Span
from fla_dist.data.packing import (
    Row,
    ShuffledShard,
    pack_documents,
    pack_padding,
    pack_stream,
)
from fla_dist.data.plan import Plan, Split
from fla_dist.data.tokenizer import Tokenizer, load_tokenizer
from fla_dist.data.units import Unit
from fla_dist.parallel.slices import slice_lengths

logger = logging.getLogger(__name__)

STATE_VERSION = 1
PREFETCHED_BATCHES = 2
OPEN_SHARDS = 16
OPEN_SHARDS_OF_A_WINDOW = 128  # a sequence takes documents from all over its window
KNOWN_COUNTS = 4096
READ_ATTEMPTS = 3


def build_pipeline(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    sequence_parallel_rank: int,
    sequence_parallel_size: int,
    micro_batch_size: int,
    split: Split = "train",
) -> TokenPipeline:
    """The batches of one rank. Building of what the cache lacks starts at once in the background.

    Raises:
        DataError: what is wrong with the files or the tokenizer that can be seen without reading
            all of the text; the rest is raised by the iterator, where the text is needed.
    """
    loaded = load_tokenizer(tokenizer, data)
    return TokenPipeline(
        data,
        loaded,
        batch_rank=data_parallel_rank,
        batch_ranks=data_parallel_size,
        slice_rank=sequence_parallel_rank,
        slice_ranks=sequence_parallel_size,
        micro_batch_size=micro_batch_size,
        split=split,
    )


class ShardReader:
    """Shards by (source, unit): waits for those being built, has damaged ones rebuilt."""

    def __init__(self, plan: Plan, builder: Builder, keep: int):
        self._sources = plan.sources
        self._cache = plan.cache
        self._builder = builder
        self._keep = keep
        self.quarantined: set[tuple[int, int]] = set()
        self.count_tokens = functools.lru_cache(maxsize=KNOWN_COUNTS)(self._count_tokens)
        self._open: OrderedDict[tuple[int, int, int], ShuffledShard] = OrderedDict()

    def _count_tokens(self, source: int, unit: int) -> int:
        wanted = self._sources[source].units[unit]
        while (record := self._cache.find(wanted)) is None:
            self._builder.wait_for(wanted)
        if record.quarantined:
            self.quarantined.add((source, unit))
        return record.tokens

    def document_begins(self, source: int, unit: int, key: int) -> np.ndarray:
        """Of a unit's documents in the stream that `key` makes of them."""
        span = Span(source, unit, key, 0, 0)
        for _ in range(READ_ATTEMPTS):
            try:
                return self.open(span).begins
            except DamagedShardError as error:
                damage = error
                self.repair([span], error)
        raise DataError(f"data.cache_dir: {damage}, however often it is rebuilt")

    def close(self) -> None:
        self._open.clear()

    def repair(self, spans: list[Span], damage: DamagedShardError) -> None:
        """Has the damaged ones of the spans' shards rebuilt from their sources."""
        logger.warning("%s; it is rebuilt from its source", damage)
        self._open.clear()
        for unit in {self._unit(span) for span in spans}:
            self._cache.discard_if_damaged(unit)
            if not self._cache.is_built(unit):
                self._builder.rebuild(unit)

    def _unit(self, span: Span) -> Unit:
        return self._sources[span.source].units[span.unit]

    def open(self, span: Span) -> ShuffledShard:
        name = (span.source, span.unit, span.key)
        shard = self._open.get(name)
        if shard is None:
            unit = self._unit(span)
            self._builder.wait_for(unit)
            shard = self._open[name] = ShuffledShard(self._cache.open(unit), span.key)
            if len(self._open) > self._keep:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return shard


def make_order(
    plan: Plan,
    data: DataConfig,
    split: Split,
    *,
    count_tokens: Callable[[int, int], int],
    document_begins: Callable[[int, int, int], np.ndarray],
) -> Order:
    """The order of a split's sequences that the config asks for."""
    sources = [SourceOrder(len(source.units), source.weight) for source in plan.sources]
    epochs = 1 if split == "validation" else None
    if data.packing == "best_fit":
        return BestFitOrder(
            sources,
            seed=data.seed,
            count_tokens=count_tokens,
            document_begins=document_begins,
            epochs=epochs,
        )
    return Order(
        sources,
        lanes=1 if split == "validation" else data.lanes,
        seed=data.seed,
        count_tokens=count_tokens,
        epochs=epochs,
    )


class TokenPipeline:
    """An iterator of this rank's batches; exact over any interruption and change of mesh.

    Training has no end. Validation ends with its sources, its last micro batch filled up with
    sequences without labels, and each `iter()` of it starts again with the first sequence.

    Attributes:
        tokenizer: what the text is encoded with.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        batch_rank: int,
        batch_ranks: int,
        slice_rank: int,
        slice_ranks: int,
        micro_batch_size: int,
        split: Split,
    ):
        if data.sequence_length < slice_ranks:
            raise DataError(
                f"data.sequence_length: {data.sequence_length} is less than a token for each of "
                f"{slice_ranks} sequence-parallel ranks"
            )
        self.tokenizer = tokenizer
        self._data = data
        self._micro_batch_size = micro_batch_size
        self._mine = range(batch_rank * micro_batch_size, (batch_rank + 1) * micro_batch_size)
        self._global_batch = batch_ranks * micro_batch_size
        self._slice_rank = slice_rank
        self._slice_lengths = slice_lengths(data.sequence_length, slice_ranks)
        self._slice_start = sum(self._slice_lengths[:slice_rank])
        self._finite = split == "validation"

        self._plan = Plan.make(data, tokenizer, split)
        lanes = 1 if self._finite or data.packing == "best_fit" else data.lanes
        self._order = make_order(
            self._plan,
            data,
            split,
            count_tokens=lambda source, unit: self._reader.count_tokens(source, unit),
            document_begins=lambda *unit: self._reader.document_begins(*unit),
        )
        best_fit = data.packing == "best_fit"
        self._identity = {
            "version": STATE_VERSION,
            "plan": self._plan.sha256[:16],
            "tokenizer": tokenizer.sha256[:16],
            "seed": data.seed,
            "lanes": lanes,
            "order": "best_fit" if best_fit else "stream",
            "window": data.sequence_length if best_fit else None,
        }
        self._builder = self._plan.make_builder(self._upcoming_units, data.num_workers)
        keep = OPEN_SHARDS_OF_A_WINDOW if best_fit else OPEN_SHARDS
        keep = max(keep, 2 * lanes * len(self._plan.sources))
        self._reader = ShardReader(self._plan, self._builder, keep)
        self._start_state = self._state = self._order.state_dict()
        self._prefetched: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException]
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        if not self._finite:
            self._builder.start()

    def __iter__(self) -> TokenPipeline:
        if self._finite:
            self._restart(self._start_state)
        return self

    def __next__(self) -> Batch:
        if self._ended is not None:
            raise self._ended
        if self._thread is None:
            self._prefetched = queue.Queue(PREFETCHED_BATCHES)
            self._thread = threading.Thread(
                target=self._prefetch, name="token-prefetch", daemon=True
            )
            self._thread.start()
        item = self._prefetched.get()
        if isinstance(item, BaseException):
            self._ended = item
            raise item
        batch, self._state = item
        return batch

    @property
    def quarantined_units(self) -> int:
        """How many units that could not be read this rank has passed over."""
        return len(self._reader.quarantined)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out so far; the same on every rank."""
        return {**self._identity, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at `state`, whatever ranks, micro batches and workers it was made with.

        Raises:
            DataError: it belongs to other data, saying which setting differs.
        """
        meanings = {
            "version": "the state's format",
            "plan": "data.sources: the files, how they are cut, or their weights",
            "tokenizer": "the tokenizer",
            "seed": "data.seed",
            "lanes": "data.lanes",
            "order": "data.packing",
            "window": "data.sequence_length, to which best_fit has packed a window,",
        }
        for name, expected in self._identity.items():
            if state.get(name) != expected:
                raise DataError(
                    f"cannot continue the data where the checkpoint left it: {meanings[name]} "
                    f"changed (then {state.get(name)}, now {expected})"
                )
        self._restart({name: state[name] for name in self._start_state})
        self._builder.reorder()

    def close(self) -> None:
        """Ends the prefetching and this process's builders and closes the shards; the cache stays
        usable."""
        self._stop.set()
        self._builder.close()
        self._join()
        self._reader.close()

    def _restart(self, state: dict[str, Any]) -> None:
        self._stop.set()
        self._join()
        self._stop.clear()
        self._ended = None
        self._order.load_state_dict(state)
        self._state = state

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _upcoming_units(self) -> Iterator[Unit]:
        """Every unit once, the sources taking turns, first those needed first."""
        by_source = [
            map(source.units.__getitem__, self._order.upcoming_units(s))
            for s, source in enumerate(self._plan.sources)
        ]
        return (unit for unit in chain.from_iterable(zip_longest(*by_source)) if unit is not None)

    def _prefetch(self) -> None:
        item: tuple[Batch, dict[str, Any]] | BaseException
        while not self._stop.is_set():
            try:
                batch = self._make_batch()
                item = (batch, self._order.state_dict())
            except Closed:
                return
            except Exhausted:
                item = StopIteration()
            except SourceTooSmall as error:
                source = self._plan.sources[error.source]
                item = DataError(
                    f"{source.key}: has {error.tokens} tokens, too few for one sequence of "
                    f"data.sequence_length {self._data.sequence_length} and the token after it"
                )
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._prefetched.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _make_batch(self) -> Batch:
        # Pinned, so that the copy to the GPU can run beside the computation.
        batch = Batch.empty(
            self._micro_batch_size,
            self._slice_lengths,
            self._slice_rank,
            pin_memory=torch.cuda.is_available(),
        )
        fields = (batch.tokens, batch.labels, batch.positions, batch.doc_ids)
        rows = map(Row, *(field.numpy() for field in fields))
        for index in range(self._global_batch):
            try:
                spans = self._order.next_sequence(self._data.sequence_length)
            except Exhausted:
                if index == 0:
                    raise
                for row in rows:
                    pack_padding(row, self._slice_start)
                break
            if index in self._mine:
                self._pack(spans, next(rows))
        return batch

    def _pack(self, spans: list[Span], row: Row) -> None:
        """Writes a sequence; a damaged shard is rebuilt from its source."""
        for _ in range(READ_ATTEMPTS):
            try:
                shards = [self._reader.open(span) for span in spans]
                if self._data.packing == "best_fit":
                    pack_documents(spans, shards, row, start=self._slice_start)
                    return
                pack_stream(
                    spans,
                    shards,
                    row,
                    start=self._slice_start,
                    restart_positions=self._data.packing == "documents",
                    mask_document_ends=self._data.mask_document_ends,
                )
                return
            except DamagedShardError as error:
                damage = error
                self._reader.repair(spans, error)
        raise DataError(f"data.cache_dir: {damage}, however often it is rebuilt")
