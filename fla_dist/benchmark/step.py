"""Times whole training steps under DeepSpeed on synthetic tokens, and tells where the time goes."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fla_dist.config import ConfigError, load_config
from fla_dist.data.batch import Batch
from fla_dist.parallel.mesh import Mesh
from fla_dist.parallel.slices import slice_lengths

WARMUP_STEPS = 3
PROFILED_STEPS = 2
GIB = 1 << 30

KINDS = {
    "exchange": r"nccl",
    "attention": r"flash|fmha|sdpa|flex_attention|attention",
    "convolution": r"\w*convolution\w*_kernel",
    "loss": r"losses_kernel",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitK|triton_tem_.*mm",
    "optimizer": r"multi_tensor|adam",
    "scan": r"^(?!triton_|swiglu)\w+_kernel$",
    "norm and pointwise": r"",
}
"""Kinds of kernels by a pattern of their names, the first that is found; a Triton kernel of this
project has a plain name that ends in `_kernel`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="the run's JSON file")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument(
        "--document-length", type=int, default=None, help="default: one document a sequence"
    )
    parser.add_argument(
        "--cold", action="store_true", help="compile with empty caches, for the first step's time"
    )
    parser.add_argument(
        "--trace", default=None, help="file for rank 0's trace by the profiler, .json.gz"
    )
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the kernels")
    parser.add_argument("--output", default=None, help="default: docs/benchmarks/models_<gpu>.json")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs one micro batch a step of the config, `overrides` applied, on all ranks; rank 0 prints
    the row and adds it to the results."""
    if arguments.cold:
        cache = tempfile.mkdtemp()
        os.environ |= {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    if not torch.cuda.is_available():
        print("error: the step benchmark needs a GPU", file=sys.stderr)
        return 2
    from fla_dist.benchmark.environment import environment
    from fla_dist.training.distributed import mesh_of, process_group
    from fla_dist.training.engine import Engine, build_model
    from fla_dist.training.metrics import HostCopy, peak_bf16_flops
    from fla_dist.training.plan import plan_batches

    try:
        config = load_config(arguments.config, overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = replace(
        config,
        training=replace(config.training, global_batch_tokens=None),
        deepspeed=replace(config.deepspeed, gradient_accumulation_steps=1),
    )
    with process_group(config.parallelism) as device:
        plan = plan_batches(config, dist.get_world_size())
        mesh = mesh_of(config.parallelism)
        model = build_model(config, mesh, device)
        flops_per_token = model.flops_per_token(config.data.sequence_length)
        engine = Engine(model, config, plan, mesh, device)
        batch = synthetic_batch(
            plan.micro_batch_size, config.data.sequence_length, config.model.vocab_size,
            arguments.document_length, mesh,
        ).to(device)  # fmt: skip
        valid_tokens = float(plan.tokens_per_step)

        def step() -> float:
            loss = engine.loss(batch)
            engine.backward(loss, valid_tokens)
            loss_copy = HostCopy(loss)
            engine.step(config.optimizer.lr)
            return loss_copy.item()  # waits for the GPU as far as training does

        step()
        first_step_seconds = time.time() - os.stat("/proc/self").st_ctime
        for _ in range(WARMUP_STEPS - 1):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        between_steps = torch.cuda.memory_allocated()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(arguments.steps):
            loss = step()
        torch.cuda.synchronize()
        dist.barrier()
        seconds = (time.perf_counter() - begin) / arguments.steps
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss became {loss}")
        peak = torch.cuda.max_memory_allocated() / GIB
        trace = arguments.trace if mesh.rank == 0 else None
        milliseconds, kernels = profile_steps(step, trace)
        rate = plan.tokens_per_step / seconds / mesh.world_size
        flops = peak_bf16_flops()
        row = {
            "config": Path(arguments.config).stem,
            "batch_size": plan.micro_batch_size,
            "sequence_length": config.data.sequence_length,
            "document_length": arguments.document_length,
            "world_size": mesh.world_size,
            "sequence_parallel_size": mesh.sequence_parallel_size,
            "zero_stage": config.deepspeed.zero_optimization.stage,
            "activation_checkpointing": config.training.activation_checkpointing,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_second_per_gpu": rate,
            "mfu": flops and rate * flops_per_token / flops,
            "step_seconds": seconds,
            "peak_memory_gib": peak,
            "memory_between_steps_gib": between_steps / GIB,
            "first_step_seconds": first_step_seconds,
            "empty_caches": arguments.cold,
            "milliseconds": milliseconds,
            "peer": None,
        }
        if mesh.rank == 0:
            print(table(row, kernels[: arguments.kernels]), flush=True)
            command = " ".join(["python", *sys.argv])
            gpu = torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower()
            path = Path(arguments.output or f"docs/benchmarks/models_{gpu}.json")
            add_row(path, row | {"command": command}, environment(command))
    return 0


def synthetic_batch(
    batch_size: int, sequence_length: int, vocab_size: int, document_length: int | None, mesh: Mesh
) -> Batch:
    """This rank's slice of random tokens, each the label of the one before it, in documents of one
    length."""
    lengths = slice_lengths(sequence_length, mesh.sequence_parallel_size)
    length = lengths[mesh.sequence_parallel_rank]
    first = sum(lengths[: mesh.sequence_parallel_rank])
    generator = torch.Generator().manual_seed(first)
    tokens = torch.randint(vocab_size, (batch_size, length + 1), generator=generator)
    positions = torch.arange(first, first + length, dtype=torch.int32)
    if document_length is not None:
        positions %= document_length
    positions = positions.repeat(batch_size, 1)
    doc_ids = (positions == 0).cumsum(dim=1).to(torch.int32)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        positions=positions,
        doc_ids=doc_ids,
        slice_lengths=lengths,
    )


def profile_steps(
    step: Callable[[], float], trace: str | None
) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Milliseconds a step by kind, idle included, and of each kernel, the longest first. Kernels of
    two streams may overlap, so that the kinds' sum may pass the step's time."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        begin = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - begin)
    if trace:
        recorded.export_chrome_trace(trace)
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    by_kernel: dict[str, float] = defaultdict(float)
    for name, start, end in spans:
        by_kernel[name] += (end - start) / 1e3 / PROFILED_STEPS
    by_kind = dict.fromkeys(KINDS, 0.0)
    for name, milliseconds in by_kernel.items():
        by_kind[kind_of(name)] += milliseconds
    busy = covered((start, end) for _, start, end in spans) / 1e3
    by_kind["idle"] = (wall - busy) / PROFILED_STEPS
    return by_kind, sorted(by_kernel.items(), key=lambda item: -item[1])


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.I))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def table(row: dict[str, Any], kernels: list[tuple[str, float]]) -> str:
    lines = [
        f"{row['config']}  {row['batch_size']} x {row['sequence_length']}  "
        f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU"
        + (f"  MFU {row['mfu']:.1%}" if row["mfu"] else "")
        + f"  peak {row['peak_memory_gib']:.1f} GiB ({row['memory_between_steps_gib']:.1f} between "
        f"steps)  first step {row['first_step_seconds']:.1f} s",
    ]
    step = 1e3 * row["step_seconds"]
    for kind, milliseconds in sorted(row["milliseconds"].items(), key=lambda item: -item[1]):
        lines.append(f"  {kind:20}{milliseconds:10.2f} ms  {milliseconds / step:6.1%}")
    lines.append(f"  {'step':20}{step:10.2f} ms")
    lines += [f"    {milliseconds:9.3f} ms  {name[:110]}" for name, milliseconds in kernels]
    return "\n".join(lines)


KEY = (
    "config", "batch_size", "sequence_length", "document_length", "world_size",
    "sequence_parallel_size", "zero_stage", "activation_checkpointing", "empty_caches",
)  # fmt: skip


def add_row(path: Path, row: dict[str, Any], environment: dict[str, Any]) -> None:
    """Adds a row to the results, in place of one of the same settings; results of another
    environment are dropped."""
    results: dict[str, Any] = {"environment": environment, "rows": []}
    if path.exists():
        before = json.loads(path.read_text())
        same = ("gpu", "driver", "torch", "triton", "commit")
        if all(before["environment"].get(key) == environment[key] for key in same):
            results["rows"] = before["rows"]
    results["rows"] = [
        other for other in results["rows"] if any(other[key] != row[key] for key in KEY)
    ] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
