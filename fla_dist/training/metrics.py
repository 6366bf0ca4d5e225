"""Records of a run: a JSONL file a rank, TensorBoard, one console line an interval, a progress bar.

<logging.dir>/logs/rank_00000.jsonl        one object a step; no collective is needed to write it
<logging.dir>/tensorboard/                 rank 0: losses, throughput, spread over the ranks
<logging.dir>/tensorboard/rank_00000/      each rank's own, where the world is at most 16
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fla_dist.config import LoggingConfig
from fla_dist.parallel.mesh import Mesh
from fla_dist.training.plan import BatchPlan

PHASES = ("step", "data", "forward", "backward", "optimizer", "communication_wait")
MEMORIES = ("allocated", "active", "reserved", "host_rss")
GIB = 1 << 30
PER_RANK_EVENTS_MAX_WORLD = 16

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOPs a second by a word of the GPU's name; MFU is not reported for other devices."""


def peak_bf16_flops() -> float | None:
    """Of this process's GPU; None where it is not in the table, or there is none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for word, flops in PEAK_BF16_FLOPS.items() if word in name), None)


class HostCopy:
    """A scalar on its way to the host. Who reads it waits for it, and not for what came after it:
    the optimizer's kernels run while the host launches the next step."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def item(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


class PhaseTimer:
    """Seconds spent in named phases of a step; on a GPU by events, without synchronizing inside."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._on_gpu:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            begin = time.perf_counter()
            yield
            self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        """Counts seconds measured by the caller, of a phase that happens on the host."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last read; what the GPU has not finished, the next one has."""
        while self._events and self._events[0][2].query():
            phase, start, end = self._events.popleft()
            self.add(phase, start.elapsed_time(end) / 1000)
        seconds, self._seconds = self._seconds, {}
        return seconds


@dataclass(frozen=True)
class StepRecord:
    """One step as rank's JSONL has it. Loss and gradient norm are of the whole batch."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    skipped_steps: int
    local_loss_finite: bool
    step_seconds: float
    data_seconds: float
    """How long this rank waited for its micro batches."""
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    """On a GPU of the step before: nobody waits for this one's end."""
    communication_wait_seconds: float
    """How long this rank waited for the others to have their batches and to end the step."""
    quarantined_units: int
    """Units of text that could not be read and were passed over since the start of the process."""
    tokens_per_second_per_gpu: float
    allocated_peak_gib: float
    active_peak_gib: float
    reserved_peak_gib: float
    host_rss_peak_gib: float
    allocation_retries: int


def memory_peaks(device: torch.device) -> dict[str, Any]:
    """The memory fields of a StepRecord: peaks since the start of the process."""
    stats = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return {
        **{
            f"{kind}_peak_gib": stats.get(f"{kind}_bytes.all.peak", 0) / GIB
            for kind in ("allocated", "active", "reserved")
        },
        "host_rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "allocation_retries": stats.get("num_alloc_retries", 0),
    }


class Records:
    """Writes what happened; `write` is local, `report` is collective."""

    def __init__(
        self,
        config: LoggingConfig,
        plan: BatchPlan,
        mesh: Mesh,
        *,
        flops_per_token: float,
        first_step: int,
    ) -> None:
        self._plan, self._mesh = plan, mesh
        self._flops_per_token = flops_per_token
        self._interval: list[StepRecord] = []
        self._start = time.perf_counter()
        root = Path(config.dir)
        name = f"rank_{mesh.rank:05d}"
        (root / "logs").mkdir(parents=True, exist_ok=True)
        self.jsonl = root / "logs" / f"{name}.jsonl"
        self._jsonl = open(self.jsonl, "a", encoding="utf-8")
        self.events = root / "tensorboard"
        self._summary = self._rank_summary = None
        if config.tensorboard and (mesh.rank == 0 or mesh.world_size <= PER_RANK_EVENTS_MAX_WORLD):
            from torch.utils.tensorboard import SummaryWriter

            if mesh.rank == 0:
                self._summary = SummaryWriter(str(self.events), purge_step=first_step)
            if mesh.world_size <= PER_RANK_EVENTS_MAX_WORLD:
                self._rank_summary = SummaryWriter(str(self.events / name), purge_step=first_step)
        self._bar = None
        if mesh.rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=plan.total_steps, initial=first_step, unit="step")

    def write(self, record: StepRecord) -> None:
        """Appends this rank's step to its JSONL file, at once."""
        self._interval.append(record)
        self._jsonl.write(json.dumps(asdict(record)) + "\n")
        self._jsonl.flush()
        if self._bar is not None:
            self._bar.update()

    def report(self) -> None:
        """Gathers one vector a rank over the steps since the last report; rank 0 writes them to
        TensorBoard and prints a line."""
        steps, self._interval = self._interval, []
        last = steps[-1]
        names = [f"time/{phase}_seconds" for phase in PHASES]
        names += [f"memory/{kind}_gib" for kind in MEMORIES] + ["memory/allocation_retries"]
        mine = [sum(getattr(s, f"{p}_seconds") for s in steps) / len(steps) for p in PHASES]
        mine += [getattr(last, f"{kind}_peak_gib") for kind in MEMORIES]
        mine += [last.allocation_retries]
        everyone = [
            torch.empty(len(mine), dtype=torch.float64) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(everyone, torch.tensor(mine, dtype=torch.float64))
        if self._rank_summary is not None:
            for name, value in zip(names, mine, strict=True):
                self._rank_summary.add_scalar(name, value, last.step)
        if self._mesh.rank != 0:
            return
        table = torch.stack(everyone)
        step_seconds = sum(s.step_seconds for s in steps)
        rate = len(steps) * self._plan.tokens_per_step / step_seconds / self._mesh.world_size
        mfu = self._mfu(rate)
        if self._summary is not None:
            scalars: dict[str, float] = {
                "loss/train": sum(s.loss for s in steps) / len(steps),
                "optimizer/lr": last.lr,
                "optimizer/grad_norm": last.grad_norm,
                "optimizer/skipped_steps": last.skipped_steps,
                "throughput/tokens_per_second_per_gpu": rate,
                "progress/tokens": last.tokens,
                "data/quarantined_units": last.quarantined_units,
            }
            if mfu is not None:
                scalars["throughput/mfu"] = mfu
            for name, column in zip(names, table.unbind(1), strict=True):
                scalars[f"{name}/min"] = column.min().item()
                scalars[f"{name}/median"] = column.median().item()
                scalars[f"{name}/max"] = column.max().item()
                scalars[f"{name}/argmax_rank"] = column.argmax().item()
            for name, value in scalars.items():
                self._summary.add_scalar(name, value, last.step)
            self._summary.flush()
        left = (self._plan.total_steps - last.step) * step_seconds / len(steps)
        memory = table[:, names.index("memory/reserved_gib")].max().item() or (
            table[:, names.index("memory/host_rss_gib")].max().item()
        )
        self.say(
            f"step {last.step}/{self._plan.total_steps}  loss {last.loss:.4f}  lr {last.lr:.2e}  "
            f"grad_norm {last.grad_norm:.3f}  tokens/s/GPU {rate:,.0f}  "
            + (f"MFU {mfu:.1%}  " if mfu is not None else "")
            + f"memory {memory:.2f} GiB  left {datetime.timedelta(seconds=round(left))}"
        )

    def validation(self, step: int, losses: dict[int, float]) -> None:
        """Writes the validation loss at each sequence length."""
        if self._mesh.rank == 0:
            for length, loss in losses.items():
                if self._summary is not None:
                    self._summary.add_scalar(f"loss/validation_{length}", loss, step)
                self.say(
                    f"step {step}/{self._plan.total_steps}  validation loss {loss:.4f}  "
                    f"length {length}"
                )
            if self._summary is not None:
                self._summary.flush()

    def say(self, text: str) -> None:
        """One line on rank 0's console, above the progress bar where there is one."""
        if self._mesh.rank == 0:
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def close(self) -> None:
        self._jsonl.close()
        for writer in (self._summary, self._rank_summary, self._bar):
            if writer is not None:
                writer.close()

    def _mfu(self, tokens_per_second_per_gpu: float) -> float | None:
        peak = peak_bf16_flops()
        return peak and tokens_per_second_per_gpu * self._flops_per_token / peak
