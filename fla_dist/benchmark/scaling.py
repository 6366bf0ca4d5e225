"""Runs a config on more and more ranks of one machine, and says what of one rank's speed is kept.

    python launch/benchmark.py scaling --config configs/samba_32k.json --sizes 1 2 4

- strong: one sequence of `data.sequence_length` divided over all ranks;
- weak: as many tokens a rank as one rank has alone, in one sequence;
- data: a sequence a rank, or, with `--sequence-parallel-size`, a sequence a group of so many.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fla_dist.config import Config, ConfigError, load_config
from fla_dist.parallel.exchange import MeshExchange

MODES = ("strong", "weak", "data")
WARMUP_STEPS = 3
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="the run's JSON file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--sequence-parallel-size", type=int, default=1, help="of the data mode's groups"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument(
        "--output", default=None, help="default: docs/benchmarks/scaling_<gpu>.json"
    )
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Starts the ranks of every row and writes the rows that ran, with a plot beside."""
    from fla_dist.benchmark.environment import environment
    from fla_dist.benchmark.links import machine_name
    from fla_dist.benchmark.plots import plot_efficiency

    try:
        if arguments.worker:
            return work(arguments, overrides)
        config = load_config(arguments.config, overrides)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(arguments.output or f"docs/benchmarks/scaling_{machine_name(device)}.json")
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[int, int, int], dict[str, Any] | None] = {}
    failed = False
    for world_size, mode, sp, length in plan(arguments, config.data.sequence_length):
        ranks = (world_size, sp, length)
        if ranks not in measured:
            measured[ranks] = start(arguments, overrides, *ranks)
        row = measured[ranks]
        if row is None:
            failed = True
            continue
        rows.append({"config": Path(arguments.config).stem, "mode": mode, **row})
        add_efficiency(rows)
        content = {"environment": environment(" ".join(["python", *sys.argv])), "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
        print(describe(rows[-1]), flush=True)
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["efficiency"] is not None:
            points.setdefault(row["mode"], []).append((row["world_size"], row["efficiency"]))
    if points:
        plot_efficiency(points, Path(arguments.config).stem, path.with_suffix(".png"))
    return 1 if failed else 0


def plan(arguments: argparse.Namespace, length: int) -> list[tuple[int, str, int, int]]:
    """World size, mode, sequence-parallel size and sequence length of every row; one rank alone is
    the same in all modes."""
    sp = arguments.sequence_parallel_size
    rows = []
    for mode in arguments.modes:
        for size in arguments.sizes:
            if mode == "strong":
                rows.append((size, mode, size, length))
            elif mode == "weak":
                rows.append((size, mode, size, size * length))
            elif size % sp == 0 or size == 1:
                rows.append((size, mode, sp if size > 1 else 1, length))
    return rows


def start(
    arguments: argparse.Namespace, overrides: list[str], world_size: int, sp: int, length: int
) -> dict[str, Any] | None:
    """One row, measured by ranks of their own; None where they failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={world_size}", sys.argv[0], "scaling"),
            *("--config", arguments.config, "--steps", str(arguments.steps)),
            *("--worker", str(result), *overrides),
            *("--parallelism.sequence_parallel_size", str(sp)),
            *("--data.sequence_length", str(length)),
        ]
        # Where it is not set, torchrun gives one rank all cores, but each of several a single one.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | threads,
        )  # fmt: skip
        if done.returncode or not result.exists():
            about = f"{world_size} ranks, sequence parallel {sp}, {length:,} tokens"
            print(f"{about}: failed\n{reason_of(done.stdout)}", flush=True)
            return None
        return json.loads(result.read_text())


def reason_of(output: str) -> str:
    """What ranks said of their end, without tracebacks and the launcher's report."""
    said = re.findall(
        r"^(?:error: |\[rank\d+\]: [\w.]*(?:Error|Exception|Interrupt)\b).*", output, re.M
    )
    return "\n".join(dict.fromkeys(said)) or output[-2000:]


def work(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """One rank of one row: training steps of one micro batch of synthetic tokens."""
    from fla_dist.benchmark.step import synthetic_batch
    from fla_dist.training.distributed import mesh_of, process_group
    from fla_dist.training.engine import Engine, build_model
    from fla_dist.training.metrics import HostCopy, PhaseTimer
    from fla_dist.training.plan import plan_batches

    config = one_micro_batch(load_config(arguments.config, overrides))
    with process_group(config.parallelism) as device:
        batch_plan = plan_batches(config, dist.get_world_size())
        mesh = mesh_of(config.parallelism)
        model = build_model(config, mesh, device)
        timer = PhaseTimer(device)
        if isinstance(model.exchange, MeshExchange):
            slices = replace(model.exchange.slices, exposed=lambda: timer("exchange"))
            model.exchange = MeshExchange(slices)
        engine = Engine(model, config, batch_plan, mesh, device)
        batch = synthetic_batch(
            batch_plan.micro_batch_size, config.data.sequence_length, config.model.vocab_size, None,
            mesh,
        ).to(device)  # fmt: skip
        for step in range(WARMUP_STEPS + arguments.steps):
            if step == WARMUP_STEPS:
                timer.read()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                dist.barrier()
                begin = time.perf_counter()
            loss = engine.loss(batch)
            engine.backward(loss, float(batch_plan.tokens_per_step))
            loss_copy = HostCopy(loss)
            engine.step(config.optimizer.lr)
            loss_copy.item()  # waits for the GPU as far as training does
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        seconds = (time.perf_counter() - begin) / arguments.steps
        exposed = timer.read().get("exchange", 0.0) / arguments.steps
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / GIB
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        most = torch.tensor([exposed, peak], dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        row = {
            "world_size": mesh.world_size,
            "sequence_parallel_size": mesh.sequence_parallel_size,
            "sequence_length": config.data.sequence_length,
            "tokens_per_second_per_gpu": batch_plan.tokens_per_step / seconds / mesh.world_size,
            "efficiency": None,
            "exposed_exchange_ms": 1e3 * most[0].item(),
            "peak_memory_gib": most[1].item(),
        }
        if mesh.rank == 0:
            Path(arguments.worker).write_text(json.dumps(row))
    return 0


def one_micro_batch(config: Config) -> Config:
    return replace(
        config,
        training=replace(config.training, global_batch_tokens=None),
        deepspeed=replace(config.deepspeed, gradient_accumulation_steps=1),
    )


def add_efficiency(rows: list[dict[str, Any]]) -> None:
    """Of each row, its tokens a second and rank over those of one rank alone in its mode."""
    for row in rows:
        alone = next((r for r in rows if r["mode"] == row["mode"] and r["world_size"] == 1), None)
        rate = row["tokens_per_second_per_gpu"]
        row["efficiency"] = alone and rate / alone["tokens_per_second_per_gpu"]


def describe(row: dict[str, Any]) -> str:
    efficiency = "" if row["efficiency"] is None else f"  efficiency {row['efficiency']:.1%}"
    return (
        f"{row['config']}  {row['mode']:6}  {row['world_size']} ranks, sequence parallel "
        f"{row['sequence_parallel_size']}, {row['sequence_length']:,} tokens: "
        f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU{efficiency}  exposed exchange "
        f"{row['exposed_exchange_ms']:.2f} ms  peak {row['peak_memory_gib']:.1f} GiB"
    )
