"""Runs a function on several gloo processes of this machine and collects what each returned."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Each rank is forked from a process that has imported these and started no thread.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "fla_dist.models"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, device: str = "cpu"
) -> list[Any]:
    """`function(*args)` on each rank, torch.distributed initialized, on a GPU each for the device
    "cuda"; a failure of one fails all."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank,
            (world_size, folder, device, function, args),
            nprocs=world_size,
            start_method="spawn" if device == "cuda" else "forkserver",
        )
        return [
            torch.load(Path(folder) / f"result_{rank}", weights_only=False)
            for rank in range(world_size)
        ]


def _rank(
    rank: int, world_size: int, folder: str, device: str, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    torch.save(function(*args), Path(folder) / f"result_{rank}")
    dist.barrier()
    dist.destroy_process_group()
