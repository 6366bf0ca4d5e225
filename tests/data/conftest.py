"""Small real text on disk, and pipelines over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fla_dist.config import DataConfig, SourceConfig, TokenizerConfig, TokenizerTrainConfig
from fla_dist.data import TokenPipeline, build_pipeline, sources

TOKENIZER = TokenizerConfig(
    train=TokenizerTrainConfig(
        vocab_size=512, sources=(SourceConfig("python-docs:"),), max_bytes=60_000
    )
)
DOCUMENTS = [topics[name] for name in sorted(topics) if len(topics[name]) < 4000][:36]


def write_sources(directory: Path) -> tuple[SourceConfig, ...]:
    """Two sources: 24 documents in several jsonl units, 12 as text files in another few."""
    (directory / "texts").mkdir(parents=True)
    lines = [json.dumps({"body": text}) + "\n" for text in DOCUMENTS[:24]]
    (directory / "lines.jsonl").write_text("".join(lines))
    for i, text in enumerate(DOCUMENTS[24:]):
        (directory / "texts" / f"{i:02}.txt").write_text(text)
    return (
        SourceConfig(str(directory / "lines.jsonl"), weight=3.0, text_field="body"),
        SourceConfig(str(directory / "texts"), weight=1.0),
    )


@pytest.fixture(scope="session")
def small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SMALLEST_UNIT_BYTES", 5000)
        yield


@pytest.fixture(scope="session")
def data_config(tmp_path_factory: pytest.TempPathFactory, small_units: None) -> DataConfig:
    """Read by many tests, whose caches it shares; damaged by none."""
    directory = tmp_path_factory.mktemp("data")
    return DataConfig(
        sources=write_sources(directory),
        validation_sources=(SourceConfig(str(directory / "texts")),),
        sequence_length=64,
        lanes=3,
        seed=5,
        cache_dir=str(directory / "cache"),
    )


@pytest.fixture
def own_data_config(data_config: DataConfig, tmp_path: Path) -> DataConfig:
    """Files and a cache of one test's own."""
    return replace(
        data_config,
        sources=write_sources(tmp_path / "own"),
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def open_pipeline() -> Iterator[Callable[..., TokenPipeline]]:
    """Opens pipelines, (data-parallel, sequence-parallel) = (rank, size) pairs; closes them."""
    opened: list[TokenPipeline] = []

    def open_one(data, dp=(0, 1), sp=(0, 1), micro_batch_size=1, split="train") -> TokenPipeline:
        pipeline = build_pipeline(
            data,
            TOKENIZER,
            data_parallel_rank=dp[0],
            data_parallel_size=dp[1],
            sequence_parallel_rank=sp[0],
            sequence_parallel_size=sp[1],
            micro_batch_size=micro_batch_size,
            split=split,
        )
        opened.append(pipeline)
        return pipeline

    yield open_one
    for pipeline in opened:
        pipeline.close()
