"""What is run, and what efficiency means."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fla_dist.benchmark import plots, scaling
from fla_dist.benchmark.report import summarize, table, write
from fla_dist.benchmark.scaling import add_arguments, add_efficiency, plan, reason_of, run
from tests.training.launching import ROOT
from tests.training.launching import write_run as write_config


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


OUTPUT = """\
W1124 torch/distributed/elastic/agent.py:1] something
[rank1]: Traceback (most recent call last):
[rank1]:   File "scaling.py", line 1, in work
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
[rank0]: fla_dist.parallel.watch.ExchangeError: rank 0: layer 3, halo, forward: rank 1 is silent
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
launch/benchmark.py FAILED
"""


def test_what_the_ranks_said_of_their_end() -> None:
    assert reason_of(OUTPUT).split("\n") == OUTPUT.split("\n")[3:5]
    assert reason_of("error: model.x: unknown\nerror: model.x: unknown\n") == (
        "error: model.x: unknown"
    )
    assert reason_of("killed") == "killed"


def measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, list[dict[str, Any]]]:
    """`scaling` of the tests' model; its exit code and rows."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = write_config(tmp_path, tmp_path / "text", tmp_path / "cache")
    result = tmp_path / "results" / "scaling.json"
    arguments = parser.parse_args(["--config", str(config), "--output", str(result), *words])
    monkeypatch.setattr(scaling.sys, "argv", [str(ROOT / "launch/benchmark.py"), "scaling"])
    monkeypatch.setattr(
        plots, "plot_efficiency", lambda points, title, path: path.write_text(repr(points))
    )
    code = run(arguments, [])
    return code, json.loads(result.read_text())["rows"]


def test_a_size_that_fails_leaves_the_others(tmp_path, monkeypatch) -> None:
    started = []

    def start(arguments, overrides, world_size, sp, length) -> dict[str, Any] | None:
        started.append((world_size, sp, length))
        rate = {1: 10.0, 2: 8.0}.get(world_size)
        row = {
            "world_size": world_size, "sequence_parallel_size": sp, "sequence_length": length,
            "tokens_per_second_per_gpu": rate, "efficiency": None, "exposed_exchange_ms": 0.0,
            "peak_memory_gib": 0.0,
        }  # fmt: skip
        return rate and row

    monkeypatch.setattr(scaling, "start", start)
    code, rows = measure(tmp_path, monkeypatch, "--modes", "strong", "data")
    assert code == 1
    assert started == [(1, 1, 64), (2, 2, 64), (4, 4, 64), (2, 1, 64), (4, 1, 64)]
    found = [(row["mode"], row["world_size"], row["efficiency"]) for row in rows]
    assert found == [("strong", 1, 1.0), ("strong", 2, 0.8), ("data", 1, 1.0), ("data", 2, 0.8)]
    plotted = (tmp_path / "results" / "scaling.png").read_text()
    assert plotted == "{'strong': [(1, 1.0), (2, 0.8)], 'data': [(1, 1.0), (2, 0.8)]}"


@pytest.mark.slow
def test_ranks_are_measured(tmp_path, monkeypatch) -> None:
    """One rank, and two groups of two."""
    words = ("--sizes", "1", "4", "--modes", "data", "--sequence-parallel-size", "2")
    code, rows = measure(tmp_path, monkeypatch, *words, "--steps", "2")
    assert code == 0
    found = [(row["world_size"], row["sequence_parallel_size"]) for row in rows]
    assert found == [(1, 1), (4, 2)]
    assert rows[0]["efficiency"] == 1.0 and rows[1]["efficiency"] > 0
    for row in rows:
        assert row["tokens_per_second_per_gpu"] > 0 and row["peak_memory_gib"] > 0
        assert (row["exposed_exchange_ms"] > 0) == (row["world_size"] == 4)


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
