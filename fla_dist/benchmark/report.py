"""Finished or running runs side by side, from the records that their ranks wrote."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """The second half of a run's steps.

    Attributes:
        efficiency: of tokens a second and rank, over the run of the fewest ranks.
        slowest_rank: the one that waited least for the others.
    """

    run: str
    world_size: int
    sequence_parallel_size: int
    sequence_length: int
    tokens_per_second_per_gpu: float
    efficiency: float
    peak_memory_gib: float
    slowest_rank: int


def summarize(folders: list[Path]) -> list[RunSummary]:
    """One summary a run, the fewest ranks first.

    Raises:
        ValueError: a folder holds no records of a run, naming it.
    """
    found = sorted((_summarize(folder) for folder in folders), key=lambda row: row["world_size"])
    alone = found[0]["tokens_per_second_per_gpu"]
    return [RunSummary(**row, efficiency=row["tokens_per_second_per_gpu"] / alone) for row in found]


def _summarize(folder: Path) -> dict[str, Any]:
    try:
        run = json.loads((folder / "logs" / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no run's logging.dir: {error}") from error
    ranks = [
        _last_half(folder / "logs" / f"rank_{rank:05d}.jsonl")
        for rank in range(run["plan"]["world_size"])
    ]
    waits = [statistics.mean(r["communication_wait_seconds"] for r in steps) for steps in ranks]
    memory = "reserved_peak_gib"
    if not any(steps[-1][memory] for steps in ranks):
        memory = "host_rss_peak_gib"
    return {
        "run": folder.name,
        "world_size": run["plan"]["world_size"],
        "sequence_parallel_size": run["plan"]["sequence_parallel_size"],
        "sequence_length": run["config"]["data"]["sequence_length"],
        "tokens_per_second_per_gpu": statistics.median(
            record["tokens_per_second_per_gpu"] for record in ranks[0]
        ),
        "peak_memory_gib": max(steps[-1][memory] for steps in ranks),
        "slowest_rank": waits.index(min(waits)),
    }


def _last_half(path: Path) -> list[dict[str, Any]]:
    """By step, its last record, of the second half of the steps."""
    if not path.exists():
        raise ValueError(f"{path} is missing")
    by_step = {}
    for line in path.read_text().split("\n")[:-1]:  # the last may still be in the writing
        record = json.loads(line)
        by_step[record["step"]] = record
    if not by_step:
        raise ValueError(f"{path} holds no step")
    steps = [by_step[step] for step in sorted(by_step)]
    return steps[len(steps) // 2 :]


def table(rows: list[RunSummary]) -> str:
    header = ("run", "ranks", "sp", "length", "tokens/s/GPU", "efficiency", "GiB", "slowest rank")
    lines = [header] + [
        (
            row.run, str(row.world_size), str(row.sequence_parallel_size),
            f"{row.sequence_length:,}", f"{row.tokens_per_second_per_gpu:,.0f}",
            f"{row.efficiency:.1%}", f"{row.peak_memory_gib:.2f}", str(row.slowest_rank),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write(rows: list[RunSummary], folder: Path) -> None:
    """The rows as JSON, as a plot, and as scalars of TensorBoard against the number of ranks."""
    from torch.utils.tensorboard import SummaryWriter

    from fla_dist.benchmark.plots import plot_efficiency

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    points = [(row.world_size, row.efficiency) for row in rows]
    plot_efficiency({"runs": points}, "efficiency by ranks", folder / "report.png")
    with SummaryWriter(str(folder)) as writer:
        for row in rows:
            for name in ("tokens_per_second_per_gpu", "efficiency", "peak_memory_gib"):
                writer.add_scalar(f"scaling/{name}", getattr(row, name), row.world_size)
