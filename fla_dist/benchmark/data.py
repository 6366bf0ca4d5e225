"""The data pipeline's speed, memory and time to resume: launch/benchmark.py data.

Everything is made here, from Python's own source text: a parquet file, a tokenizer, a cache, and a
plan of a million units over sparse files. Rates are tokens a second of processor time of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fla_dist.config import DataConfig, SourceConfig, TokenizerConfig, TokenizerTrainConfig
from fla_dist.data import build_pipeline, load_tokenizer, sources
from fla_dist.data.cache import TokenCache
from fla_dist.data.documents import read_documents
from fla_dist.data.plan import Plan
from fla_dist.data.tokenizer import Tokenizer

LENGTHS = (2048, 8192, 32768, 131072, 1048576)
DELIVERY_SECONDS = 1.0
BUILD_UNITS = 5
PACKAGES = ("numpy", "torch", "tokenizers", "datasets", "pyarrow")
LARGE_PLAN_FILES, LARGE_PLAN_FILE_UNITS = 20_000, 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default=f"docs/benchmarks/data_{platform.node()}.json")
    parser.add_argument("--vocab-size", type=int, default=32000)


def run(arguments: argparse.Namespace) -> int:
    """Measures everything and writes it, with the environment, to `arguments.output`."""
    # A builder's worker runs the tokenizer on one core; so does the measurement of one core.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_parquet(directory / "text.parquet")
        tokenizer = TokenizerConfig(
            train=TokenizerTrainConfig(arguments.vocab_size, (SourceConfig("python-source:"),))
        )
        data = DataConfig(
            sources=(SourceConfig(str(directory / "text.parquet")),),
            sequence_length=32768,
            lanes=2,
            cache_dir=str(directory / "cache"),
        )
        loaded = load_tokenizer(tokenizer, data)
        results: dict[str, Any] = {"environment": describe_environment()}
        results["build"] = measure_build(data, loaded, directory)
        results["deliver"] = list(measure_delivery(data, tokenizer))
        results["large_plan"] = measure_large_plan(directory, loaded)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


def describe_environment() -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_parquet(path: Path) -> None:
    """The standard library's and torch's Python source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    configs = [SourceConfig("python-source:"), SourceConfig("python-source:torch")]
    units = (unit for source in sources.resolve_sources(configs, "") for unit in source.units)
    texts = [text for unit in units for text in read_documents(unit)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100)


def measure_build(data: DataConfig, tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Parquet → tokens → checksums → fsync → rename, in this process."""
    plan = Plan.make(data, tokenizer, "train")
    cache = TokenCache(directory / "build", tokenizer.sha256)
    warm_up, *units = list(plan.units())[-BUILD_UNITS - 1 :]
    cache.build(warm_up, tokenizer)  # a worker builds unit after unit
    wall, processor = time.perf_counter(), time.process_time()
    for unit in units:
        cache.build(unit, tokenizer)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    records = [record for record in map(cache.find, units) if record is not None]
    tokens = sum(record.tokens for record in records)
    return {
        "tokens": tokens,
        "vocab_size": tokenizer.vocab_size,
        "tokens_per_second_per_core": round(tokens / processor),
        "tokens_per_wall_second": round(tokens / wall),
    }


def measure_delivery(data: DataConfig, tokenizer: TokenizerConfig) -> Iterator[dict[str, Any]]:
    """Batches from a warm cache, of units as large as those of a large source."""
    smallest = sources.SMALLEST_UNIT_BYTES
    sources.SMALLEST_UNIT_BYTES = sources.LARGEST_UNIT_BYTES
    try:
        for length in LENGTHS:
            for packing, slices in (("documents", 1), ("documents", 8), ("best_fit", 1)):
                yield deliver(data, tokenizer, length, packing, slices)
    finally:
        sources.SMALLEST_UNIT_BYTES = smallest


def deliver(
    data: DataConfig, tokenizer: TokenizerConfig, length: int, packing: Any, slices: int
) -> dict[str, Any]:
    """One rank's rate; a token counts once a rank that holds it."""
    micro_batch_size = max(1, 131072 * slices // length)
    config = DataConfig(
        data.sources, length, lanes=data.lanes, cache_dir=data.cache_dir, packing=packing
    )
    pipeline = build_pipeline(
        config,
        tokenizer,
        data_parallel_rank=0,
        data_parallel_size=1,
        sequence_parallel_rank=0,
        sequence_parallel_size=slices,
        micro_batch_size=micro_batch_size,
    )
    for _ in range(1 + (1 << 25) // (micro_batch_size * length)):  # of the system's cache
        next(pipeline)
    tokens = 0
    wall, processor = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < DELIVERY_SECONDS:
        tokens += next(pipeline).tokens.numel()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    pipeline.close()
    return {
        "sequence_length": length,
        "packing": packing,
        "sequence_parallel_size": slices,
        "micro_batch_size": micro_batch_size,
        "tokens_per_second_per_core": round(tokens / processor),
        "tokens_per_wall_second": round(tokens / wall),
    }


def measure_large_plan(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """A reader of a million units in a process of its own, resumed far inside."""
    files = directory / "large"
    files.mkdir()
    for index in range(LARGE_PLAN_FILES):
        with open(files / f"{index:06}.txt", "wb") as file:
            file.truncate(LARGE_PLAN_FILE_UNITS * sources.LARGEST_UNIT_BYTES)
    command = [sys.executable, "-m", "fla_dist.benchmark.large_plan", str(directory)]
    command.append(str(tokenizer.path))
    for _ in range(2):  # the first one divides the files and writes the shards that are read
        process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout)
