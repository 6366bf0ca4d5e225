"""Starting and ending the process group, and doing things on all ranks or on none.

Tensors on the CPU travel over gloo and tensors on a GPU over NCCL, so that what the ranks agree on
(batches, failures, signals) needs no GPU synchronization.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fla_dist.config import ParallelismConfig
from fla_dist.parallel.mesh import Mesh, build_mesh
from fla_dist.parallel.watch import explained, watching

Result = TypeVar("Result")


class RunError(RuntimeError):
    """What stopped the run, the same text on every rank."""


@contextmanager
def process_group(
    parallelism: ParallelismConfig = ParallelismConfig(),  # noqa: B008 (frozen)
) -> Iterator[torch.device]:
    """torch.distributed over the ranks that a launcher started, or over this process alone, its
    exchanges under watch; yields this rank's device."""
    on_gpu = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if on_gpu
        else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    # Above the exchanges' own, whose message says more, and long enough for a checkpoint.
    timeout = timedelta(seconds=max(1800.0, 2 * parallelism.exchange_timeout_seconds))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with watching(parallelism.exchange_timeout_seconds):
            yield device
    finally:
        dist.destroy_process_group()


def mesh_of(parallelism: ParallelismConfig) -> Mesh:
    """The mesh that the config asks for.

    Raises:
        RunError: the ranks and hosts that were started do not allow it.
    """
    try:
        return build_mesh(
            parallelism.sequence_parallel_size,
            state_exchange=parallelism.state_exchange,
            attention_exchange=parallelism.attention_exchange,
        )
    except ValueError as error:
        raise RunError(str(error)) from error


def together(action: Callable[[], Result]) -> Result:
    """Runs `action` on every rank; where it fails on some, raises one RunError on all.

    For what may go wrong on one rank only (a file, a disk), so that the others do not wait for it
    in a collective. `action` itself must not communicate.
    """
    result: list[Result] = []
    failure = None
    try:
        result.append(action())
    except (ValueError, OSError) as error:
        failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    raise_first(failures)
    return result[0]


def raise_first(failures: list[str | None]) -> None:
    """Raises a RunError for the messages of all ranks, if there is one."""
    ranks = [rank for rank, failure in enumerate(failures) if failure]
    if ranks:
        where = "" if len(ranks) == len(failures) else f" (rank {', '.join(map(str, ranks))})"
        raise RunError(f"{failures[ranks[0]]}{where}")


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Adds each value over all ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    with explained("agreement of all ranks", range(dist.get_world_size())):
        dist.all_reduce(total)
    return total.tolist()
