"""build_pipeline: sources, cache, order and packing behind one iterator."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch

from fla_dist.config import DataConfig, TokenizerConfig
from fla_dist.data.batch import Batch
from fla_dist.data.builder import Builder, Closed
from fla_dist.data.errors import DamagedShardError, DataError
from fla_dist.data.order import Exhausted, Order, SourceOrder, SourceTooSmall, Span
from fla_dist.data.packing import PackedSlice, ShuffledShard, pack_slice, padding
from fla_dist.data.plan import Plan, Split
from fla_dist.data.sources import Unit
from fla_dist.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

STATE_VERSION = 1
PREFETCHED_BATCHES = 2
OPEN_SHARDS = 64
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
        self._counts: dict[tuple[int, int], int] = {}
        self._open: OrderedDict[tuple[int, int, int], ShuffledShard] = OrderedDict()

    def count_tokens(self, source: int, unit: int) -> int:
        count = self._counts.get((source, unit))
        if count is None:
            wanted = self._sources[source].units[unit]
            while (record := self._cache.find(wanted)) is None:
                self._builder.wait_for(wanted)
            count = self._counts[source, unit] = record.tokens
        return count

    def pack(self, spans: list[Span], **layout: Any) -> PackedSlice:
        """`pack_slice` of the spans' shards; a damaged one is rebuilt from its source."""
        for _ in range(READ_ATTEMPTS):
            try:
                return pack_slice(spans, [self._shard(span) for span in spans], **layout)
            except DamagedShardError as error:
                damage = error
                logger.warning("%s; it is rebuilt from its source", error)
                self._open.clear()
                for unit in {self._unit(span) for span in spans}:
                    self._cache.discard_if_damaged(unit)
                    if not self._cache.is_built(unit):
                        self._builder.rebuild(unit)
        raise DataError(f"data.cache_dir: {damage}, however often it is rebuilt")

    def _unit(self, span: Span) -> Unit:
        return self._sources[span.source].units[span.unit]

    def _shard(self, span: Span) -> ShuffledShard:
        name = (span.source, span.unit, span.key)
        shard = self._open.get(name)
        if shard is None:
            unit = self._unit(span)
            self._builder.wait_for(unit)
            shard = self._open[name] = ShuffledShard.make(self._cache.open(unit), span.key)
            if len(self._open) > self._keep:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return shard


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
        if data.sequence_length % slice_ranks:
            raise DataError(
                f"data.sequence_length: {data.sequence_length} is not divisible by "
                f"{slice_ranks} sequence-parallel ranks"
            )
        self.tokenizer = tokenizer
        self._data = data
        self._micro_batch_size = micro_batch_size
        self._mine = range(batch_rank * micro_batch_size, (batch_rank + 1) * micro_batch_size)
        self._global_batch = batch_ranks * micro_batch_size
        slice_length = data.sequence_length // slice_ranks
        self._slice = range(slice_rank * slice_length, (slice_rank + 1) * slice_length)
        self._finite = split == "validation"

        self._plan = Plan.make(data, tokenizer, split)
        lanes = 1 if self._finite else data.lanes
        self._order = Order(
            [SourceOrder(len(source.units), source.weight) for source in self._plan.sources],
            lanes=lanes,
            seed=data.seed,
            count_tokens=lambda source, unit: self._reader.count_tokens(source, unit),
            epochs=1 if self._finite else None,
        )
        self._identity = {
            "version": STATE_VERSION,
            "plan": self._plan.sha256[:16],
            "tokenizer": tokenizer.sha256[:16],
            "seed": data.seed,
            "lanes": lanes,
        }
        self._builder = self._plan.make_builder(self._upcoming_units(), data.num_workers)
        keep = max(OPEN_SHARDS, 2 * lanes * len(self._plan.sources))
        self._reader = ShardReader(self._plan, self._builder, keep)
        self._start_state = self._state = self._order.state_dict()
        self._waited_seconds = 0.0
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
        since = time.monotonic()
        item = self._prefetched.get()
        self._waited_seconds += time.monotonic() - since
        if isinstance(item, BaseException):
            self._ended = item
            raise item
        batch, self._state = item
        return batch

    @property
    def wait_seconds(self) -> float:
        """How long `next` waited for data since this was last read."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

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
        }
        for name, expected in self._identity.items():
            if state.get(name) != expected:
                raise DataError(
                    f"cannot continue the data where the checkpoint left it: {meanings[name]} "
                    f"changed (then {state.get(name)}, now {expected})"
                )
        self._restart({name: state[name] for name in self._start_state})
        self._builder.reorder(self._upcoming_units())

    def close(self) -> None:
        """Ends the prefetching and this process's builders; the cache stays usable."""
        self._stop.set()
        self._builder.close()
        self._join()

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
        rows: list[PackedSlice] = []
        start, stop = self._slice.start, self._slice.stop
        for index in range(self._global_batch):
            try:
                spans = self._order.next_sequence(self._data.sequence_length)
            except Exhausted:
                if index == 0:
                    raise
                rows += [padding(start, stop)] * (self._micro_batch_size - len(rows))
                break
            if index in self._mine:
                rows.append(
                    self._reader.pack(
                        spans,
                        start=start,
                        stop=stop,
                        packing=self._data.packing,
                        mask_document_ends=self._data.mask_document_ends,
                    )
                )
        batch = Batch(
            *(
                torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
                for name in ("tokens", "labels", "positions", "doc_ids")
            )
        )
        # Pinned here, so that the copy to the GPU can run beside the computation.
        return batch.pin_memory() if torch.cuda.is_available() else batch
