"""A reader of a very large plan, in a process of its own: its time to resume, and its memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fla_dist.config import DataConfig, SourceConfig
from fla_dist.data.pipeline import TokenPipeline
from fla_dist.data.tokenizer import open_tokenizer

SEQUENCE = 10_000_000
SEQUENCE_LENGTH = 32768
UNIT_TOKENS = 8_000_000
DOCUMENT_TOKENS = 1000
BATCHES = 200


def main() -> None:
    directory, tokenizer_path = map(Path, sys.argv[1:])
    imported = memory_mib("VmHWM")
    data = DataConfig(
        sources=(SourceConfig(str(directory / "large")),),
        sequence_length=SEQUENCE_LENGTH,
        cache_dir=str(directory / "large_cache"),
    )
    tokenizer = open_tokenizer(tokenizer_path)
    since = time.perf_counter()
    pipeline = TokenPipeline(
        data,
        tokenizer,
        batch_rank=0,
        batch_ranks=1,
        slice_rank=0,
        slice_ranks=1,
        micro_batch_size=1,
        split="train",
    )
    open_seconds = time.perf_counter() - since
    state = pipeline.state_dict() | state_at(SEQUENCE, data.lanes)
    since = time.perf_counter()
    pipeline.load_state_dict(state)
    load_seconds = time.perf_counter() - since

    units, cache = pipeline._plan.sources[0].units, pipeline._plan.cache
    upcoming = pipeline._order.upcoming_units(0)
    documents = [np.arange(DOCUMENT_TOKENS, dtype=tokenizer.dtype)] * (
        UNIT_TOKENS // DOCUMENT_TOKENS
    )
    for unit in [units[next(upcoming)] for _ in range(data.lanes)]:
        if not cache.is_built(unit):
            cache.store(unit, tokenizer, "0" * 64, lambda: documents)
    since = time.perf_counter()
    next(pipeline)
    first_batch_seconds = time.perf_counter() - since
    for _ in range(BATCHES):
        next(pipeline)
    result: dict[str, Any] = {
        "units": len(units),
        "sequence": SEQUENCE,
        "open_plan_seconds": round(open_seconds, 3),
        "resume_to_first_batch_seconds": round(load_seconds + first_batch_seconds, 3),
        "state_bytes": len(json.dumps(pipeline.state_dict())),
        "peak_memory_of_imports_mib": round(imported),
        "peak_memory_mib": round(memory_mib("VmHWM")),
    }
    pipeline.close()
    print(json.dumps(result))


def state_at(sequence: int, lanes: int) -> dict[str, Any]:
    """The position after `sequence` sequences of one source of units of UNIT_TOKENS."""
    units, offset = divmod(sequence // lanes * SEQUENCE_LENGTH, UNIT_TOKENS)
    source = {
        "tokens": sequence * SEQUENCE_LENGTH,
        "sequences": sequence,
        "dealt": (units + 1) * lanes,
        "lanes": [[units * lanes + lane, offset] for lane in range(lanes)],
    }
    return {"sequence": sequence, "sources": [source]}


def memory_mib(kind: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
