"""Measures the collectives of sequence parallelism, and fits seconds = α + bytes / B to each kind
of link.

    torchrun --nproc-per-node 8 launch/benchmark.py links
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fla_dist.parallel.collectives import all_gather, all_to_all, send_and_receive
from fla_dist.parallel.mesh import Mesh, build_mesh

SIZES = tuple(1 << power for power in range(16, 25))
"""Bytes that each rank brings to a collective."""
WARMUPS, REPEATS = 3, 10
QUEUED = 20
"""Calls of a repeat on a GPU, one behind the other, as a step queues them: what the host takes to
start one is hidden there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks-per-host", type=int, default=None, help="default: what the launcher says"
    )
    parser.add_argument(
        "--largest", type=int, default=SIZES[-1], help="bytes of the largest message of a rank"
    )
    parser.add_argument(
        "--output", default=None, help="default: docs/benchmarks/links_<machine>.json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures on the ranks that a launcher started; rank 0 writes the result."""
    from fla_dist.benchmark.environment import environment
    from fla_dist.training.distributed import process_group

    with process_group() as device:
        if dist.get_world_size() == 1:
            print("links: one rank has no links; start it with torchrun")
            return 1
        mesh = build_mesh(dist.get_world_size(), ranks_per_host=arguments.ranks_per_host)
        sizes = [size for size in SIZES if size <= arguments.largest]
        rows = measure(mesh, device, sizes)
        if mesh.rank != 0:
            return 0
        machine = machine_name(device)
        path = Path(arguments.output or f"docs/benchmarks/links_{machine}.json")
        links = {kind: fit(rows, kind) for kind in dict.fromkeys(row["link"] for row in rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        command = f"torchrun --nproc-per-node {mesh.ranks_per_host} {' '.join(sys.argv)}"
        content = {
            "environment": environment(command),
            "links": links,
            "rows": rows,
        }
        path.write_text(json.dumps(content, indent=1))
        for kind, link in links.items():
            print(
                f"{kind}: {1e6 * link['alpha_seconds']:.1f} us, "
                f"{link['bytes_per_second'] / 1e9:.2f} GB/s received"
            )
        print(f"written to {path}")
    return 0


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace("NVIDIA ", "").split()[0].lower()
    return f"cpu_{platform.machine()}"


def groups(mesh: Mesh) -> dict[str, ProcessGroup | None]:
    """The groups whose collectives stay in a host, and cross hosts."""
    if mesh.host_group is not None:
        return {"host": mesh.host_group, "hosts": mesh.cross_group}
    return {"hosts" if mesh.spans_hosts else "host": mesh.sequence_group}


def measure(mesh: Mesh, device: torch.device, sizes: list[int]) -> list[dict[str, Any]]:
    """A row for each link, collective and size; the median over repeats of the slowest rank."""
    rows = []
    for link, group in groups(mesh).items():
        ranks = dist.get_world_size(group)
        for size in sizes:
            message = torch.zeros(size // 4 // ranks * ranks, device=device)
            received = message.new_empty(ranks * message.numel())
            calls: dict[str, tuple[float, Callable[[], Any]]] = {
                "all_gather": (ranks - 1, partial(all_gather, received, message, group=group)),
                "all_to_all": (
                    (ranks - 1) / ranks,
                    partial(all_to_all, received[: message.numel()], message, group=group),
                ),
                "shift": (1, partial(shift, received[: message.numel()], message, group)),
            }
            for name, (times, call) in calls.items():
                rows.append(
                    {
                        "link": link,
                        "collective": name,
                        "ranks": ranks,
                        "message_bytes": 4 * message.numel(),
                        "received_bytes": int(times * 4 * message.numel()),
                        "seconds": seconds_of(call, device),
                    }
                )
    return rows


def shift(received: Tensor, message: Tensor, group: ProcessGroup | None) -> None:
    """Every rank to the one after it, the last to the first."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    place = ranks.index(dist.get_rank())
    after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]
    for work in send_and_receive([(message, after)], [(received, before)], group):
        work.wait()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call; the median over repeats of the slowest rank."""
    calls = QUEUED if device.type == "cuda" else 1
    times = []
    for repeat in range(WARMUPS + REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= WARMUPS:
            times.append((time.perf_counter() - begin) / calls)
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.median().item()


def fit(rows: list[dict[str, Any]], link: str) -> dict[str, float]:
    """α and B of the all-gathers and all-to-alls of a link: least squares of the relative errors,
    so that small messages count as much as large ones."""
    points = [
        (row["received_bytes"], row["seconds"])
        for row in rows
        if row["link"] == link and row["collective"] != "shift"
    ]
    received, seconds = torch.tensor(points, dtype=torch.float64).T
    columns = torch.stack([torch.ones_like(seconds), received], dim=1) / seconds[:, None]
    alpha, slope = torch.linalg.lstsq(columns, torch.ones_like(seconds)[:, None]).solution[:, 0]
    return {
        "alpha_seconds": max(alpha.item(), 0.0),
        "bytes_per_second": 1 / max(slope.item(), 1e-15),
    }
