"""What is run, and what efficiency means."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fla_dist.benchmark.report import summarize, table, write
from fla_dist.benchmark.scaling import add_arguments, add_efficiency, plan


def test_the_rows_of_each_mode() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--config", "c", "--sizes", "1", "4"])
    assert plan(arguments, 100) == [
        (1, "strong", 1, 100), (4, "strong", 4, 100),
        (1, "weak", 1, 100), (4, "weak", 4, 400),
        (1, "data", 1, 100), (4, "data", 1, 100),
    ]  # fmt: skip
    words = ["--config", "c", "--modes", "data", "--sequence-parallel-size", "2"]
    assert plan(parser.parse_args(words), 100) == [
        (1, "data", 1, 100), (2, "data", 2, 100), (4, "data", 2, 100)
    ]  # fmt: skip


def test_efficiency_is_against_one_rank_of_the_mode() -> None:
    rows: list[dict[str, Any]] = [
        {"mode": mode, "world_size": ranks, "tokens_per_second_per_gpu": rate}
        for mode, ranks, rate in (("weak", 1, 10.0), ("weak", 4, 9.0), ("strong", 2, 8.0))
    ]
    add_efficiency(rows)
    assert [row["efficiency"] for row in rows] == [1.0, 0.9, None]


def write_run(folder: Path, rates: list[float], waits: list[float]) -> Path:
    """A run of four steps; the first two are no measure of speed."""
    (folder / "logs").mkdir(parents=True)
    about = {
        "plan": {"world_size": len(waits), "sequence_parallel_size": 1},
        "config": {"data": {"sequence_length": 4096}},
    }
    (folder / "logs" / "run.json").write_text(json.dumps(about))
    for rank, wait in enumerate(waits):
        lines = [
            {
                "step": step + 1,
                "tokens_per_second_per_gpu": rate,
                "communication_wait_seconds": wait,
                "reserved_peak_gib": 0.0,
                "host_rss_peak_gib": 1.5 + rank,
            }
            for step, rate in enumerate(rates)
        ]
        path = folder / "logs" / f"rank_{rank:05d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "tok')
    return folder


def test_the_report(tmp_path: Path) -> None:
    two = write_run(tmp_path / "two", [1.0, 2.0, 80.0, 100.0], [0.3, 0.1])
    one = write_run(tmp_path / "one", [1.0, 2.0, 100.0, 100.0], [0.0])
    rows = summarize([two, one])
    assert [(row.run, row.efficiency, row.slowest_rank) for row in rows] == [
        ("one", 1.0, 0), ("two", 0.9, 1)
    ]  # fmt: skip
    assert rows[1].peak_memory_gib == 2.5
    assert table(rows).split("\n")[2].split() == [
        "two",
        "2",
        "1",
        "4,096",
        "90",
        "90.0%",
        "2.50",
        "1",
    ]
    write(rows, tmp_path / "report")
    names = {path.name.split(".")[0] for path in (tmp_path / "report").iterdir()}
    assert {"report", "events"} <= names
    with pytest.raises(ValueError, match="absent is no run's logging.dir"):
        summarize([tmp_path / "absent"])
