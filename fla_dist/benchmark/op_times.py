"""Times ops against their physical floor, beside the peer's op where it is installed, and only
where they are right.

An op's floor is the larger of two times: its inputs, outputs and gradients moved once through
memory, and its matrix products at the tensor cores' rate.

Each op runs in a process of its own with empty compilation caches. All make their first calls side
by side; then one after another measures.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
import triton
from torch import Tensor

from fla_dist.benchmark.environment import environment
from fla_dist.benchmark.ops import LIMITS, OPS, SHAPES, Op, Shape, errors, make_inputs, run

DTYPE = torch.bfloat16
RATES = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}
"""Measured: bytes a second of a device-to-device copy, and bf16 FLOP/s of a large matrix
product."""


def measure(
    call: Callable[..., Any], inputs: list[Tensor], output_gradient: Tensor
) -> dict[str, float]:
    """Medians of `do_bench`, which empties the L2 before each run, and the memory that forward and
    backward take beyond the inputs."""

    def both() -> list[Tensor]:
        return run(call, inputs, output_gradient)

    both()
    with torch.no_grad():
        forward = triton.testing.do_bench(lambda: call(*inputs), return_mode="median")
    forward_backward = triton.testing.do_bench(both, return_mode="median")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"forward_ms": forward, "forward_backward_ms": forward_backward, "peak_extra_mib": extra}


def floor_ms(op: Op, shape: Shape, inputs: list[Tensor], output_gradient: Tensor) -> float:
    """Forward and backward: the inputs and the output once; then those, the output's gradient, and
    the inputs' gradients once."""
    bandwidth, rate = RATES.get(torch.cuda.get_device_name(), RATES["NVIDIA H200"])
    arguments, output = sum(x.nbytes for x in inputs), output_gradient.nbytes
    gradients = sum(x.nbytes for x in inputs if x.requires_grad)
    products = 4 * shape.K * shape.V if op.products is None else op.products(shape)
    flops = 3 * shape.B * shape.T * shape.H * products
    return 1e3 * max((2 * arguments + 2 * output + gradients) / bandwidth, flops / rate)


def timed_call(call: Callable[..., Any], inputs: list[Tensor], output_gradient: Tensor) -> float:
    """Seconds of one forward and backward."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run(call, inputs, output_gradient)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def first_call_seconds(op: Op, shape: Shape) -> float | None:
    """Of a forward and backward that compile; None where the GPU has no room beside others."""
    try:
        return timed_call(op.call, *make_inputs(op, shape, DTYPE))
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def peer_row(op: Op, inputs: list[Tensor], output_gradient: Tensor) -> dict[str, Any] | None:
    """The same measurements of flash-linear-attention's op, or None where it is not installed."""
    if op.peer is None or importlib.util.find_spec("fla") is None:
        return None
    call = getattr(importlib.import_module(op.peer[0]), op.peer[1])
    if op is OPS["retention"]:
        inputs = inputs[:3]
    first = timed_call(call, inputs, output_gradient)
    return {
        "name": op.peer[1], "version": version("flash-linear-attention"),
        **measure(call, inputs, output_gradient), "first_call_seconds": first,
    }  # fmt: skip


def row(name: str, shape: Shape, first: float | None) -> dict[str, Any]:
    """All that is told of an op at a shape; without times where it is wrong."""
    op = OPS[name]
    first = first_call_seconds(op, shape) if first is None else first
    found = errors(op, shape, DTYPE)
    torch.cuda.empty_cache()
    told = {"op": name, "shape": vars(shape), "dtype": "bf16", "errors": found}
    if max(found.values()) > LIMITS[DTYPE]:
        return told
    inputs, output_gradient = make_inputs(op, shape, DTYPE)
    return {
        **told, **measure(op.call, inputs, output_gradient), "first_call_seconds": first,
        "floor_ms": floor_ms(op, shape, inputs, output_gradient),
        "peer": peer_row(op, inputs, output_gradient),
    }  # fmt: skip


def serve(name: str, shapes: tuple[Shape, ...]) -> None:
    """A process of one op: makes its first calls, a head size each, and says that it is ready; then
    writes a row for each line that it reads."""
    firsts: dict[tuple[int, int], float | None] = {}
    for shape in shapes:
        if (shape.K, shape.V) not in firsts:
            firsts[shape.K, shape.V] = first_call_seconds(OPS[name], shape)
    print("ready", flush=True)
    for shape, _ in zip(shapes, sys.stdin, strict=False):
        told = row(name, shape, firsts[shape.K, shape.V])
        torch.cuda.empty_cache()
        print(json.dumps(told), flush=True)


@contextmanager
def server(name: str, shapes: int) -> Iterator[subprocess.Popen[str]]:
    """The process of an op; ended with the context."""
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, str(shapes)],
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next row.

    Raises:
        RuntimeError: the process ended; it has said why.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        raise RuntimeError(f"it ended with exit code {process.wait()}") from None


def benchmark(names: list[str], shapes: int, path: str, command: str) -> bool:
    """Writes the rows of the first `shapes` shapes that are right to `path` as they come, prints a
    table; False where an op was refused or failed."""
    rows: list[dict[str, Any]] = []
    fine = True
    print(f"{'op':18}{'B,T,H,K,V':24}{'forward':>9}{'fwd+bwd':>9}{'floor':>8}{'%':>5}", end="")
    print(f"{'MiB':>7}{'first':>7}  error")
    with ExitStack() as stack:
        processes = {name: stack.enter_context(server(name, shapes)) for name in names}
        for process in processes.values():
            assert process.stdout is not None
            process.stdout.readline()  # "ready"
        for shape in SHAPES[:shapes]:
            for name, process in list(processes.items()):
                label = f"{name:18}{','.join(map(str, vars(shape).values())):24}"
                try:
                    told = ask(process)
                except RuntimeError as error:
                    print(f"{label} failed: {error}", flush=True)
                    fine = False
                    del processes[name]
                    continue
                shown = " ".join(f"{key} {value:.1e}" for key, value in told["errors"].items())
                if "forward_ms" not in told:
                    print(f"{label} refused: {shown}", flush=True)
                    fine = False
                    continue
                rows.append(told)
                total, floor = told["forward_backward_ms"], told["floor_ms"]
                print(f"{label}{told['forward_ms']:9.3f}{total:9.3f}{floor:8.3f}", end="")
                print(f"{100 * floor / total:5.0f}{told['peak_extra_mib']:7.0f}", end="")
                print(f"{told['first_call_seconds']:7.1f}  {shown}", flush=True)
                with open(path, "w") as file:
                    json.dump({"environment": environment(command), "rows": rows}, file, indent=1)
    return fine


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("op")
    parser.add_argument("shapes", type=int)
    arguments = parser.parse_args()
    serve(arguments.op, SHAPES[: arguments.shapes])
