"""Text files in, this rank's slice of packed token sequences out; exact over any interruption.

    units.py        a unit of text, the plan's atom, and a compact table of them
    sources.py      config → files → units
    hub.py          datasets of the Hugging Face hub
    documents.py    the documents of one unit
    tokenizer.py    a tokenizer.json, loaded or trained here
    words.py        encoding word by word
    shard.py        one unit's tokens on disk: format, checksums
    cache.py        which unit is in which shard
    lease.py        a file that one process holds
    builder.py      the background builder: worker processes that turn units into shards
    plan.py         a run's sources, tokenizer and cache
    order.py        which tokens form global sequence n: permutation, lanes, blend, cursor
    best_fit.py     the same for windowed best-fit packing
    packing.py      a sequence's tokens, labels, positions and document ids from shards
    pipeline.py     build_pipeline: all of it behind one iterator
    inspection.py   what launch/prepare_data.py shows

Names are resolved at first use (PEP 562): a builder process imports this package but neither
torch nor the pipeline.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fla_dist.data.batch import Batch
    from fla_dist.data.errors import DataError
    from fla_dist.data.pipeline import TokenPipeline, build_pipeline
    from fla_dist.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "DataError", "TokenPipeline", "Tokenizer", "build_pipeline", "load_tokenizer"]

_MODULES = {
    "Batch": "batch",
    "DataError": "errors",
    "TokenPipeline": "pipeline",
    "Tokenizer": "tokenizer",
    "build_pipeline": "pipeline",
    "load_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
