"""Compiles kernels ahead of time, on a machine without a GPU, and reads what they would take there.

The ops themselves are run on small CPU tensors with Triton's launcher replaced by a recorder, so
what is compiled is what they launch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fla_dist.kernels.common import launch

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 512
"""A thread may spill so much where that was measured to be faster; more is a mistake."""
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Recorded:
    """One launch: a kernel and everything it is compiled from."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    registers: int | None

    def key(self) -> tuple[Any, ...]:
        constants = tuple(sorted((name, str(value)) for name, value in self.constants.items()))
        return (
            self.kernel.fn.__name__,
            tuple(self.signature.items()),
            constants,
            self.warps,
            self.stages,
            self.registers,
        )


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on one architecture; `problem` says why it would not launch, or is
    empty."""

    kernel: str
    setting: str
    architecture: int
    registers: int
    local_bytes: int
    shared_bytes: int
    seconds: float
    problem: str


def _record(kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any]) -> Recorded:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        name: value for name, value in options.items() if name in kernel.arg_names
    }
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return Recorded(
        kernel, signature, constants, tuple(divisible), options.get("num_warps", 4),
        options.get("num_stages", 3), options.get("maxnreg"),
    )  # fmt: skip


@contextmanager
def recording(architecture: int) -> Iterator[list[Recorded]]:
    """Within it, kernels are recorded instead of launched, with the settings of `architecture`."""
    records: list[Recorded] = []

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        records.append(_record(self, arguments, options))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "capability", lambda tensor: architecture),
    ):
        yield records


def record(architecture: int, launches: Callable[[], Any]) -> list[Recorded]:
    """The different kernels that `launches()` would start."""
    with recording(architecture) as records:
        launches()
    return list({recorded.key(): recorded for recorded in records}.values())


_to_compile: list[tuple[Recorded, int]] = []


def _compile_at(index: int) -> Compiled:
    return compile_for(*_to_compile[index])


def compile_all(kernels: list[tuple[Recorded, int]], processes: int) -> Iterator[Compiled]:
    """Compiles (kernel, architecture) pairs in processes side by side, which inherit them by a
    fork; in order."""
    _to_compile[:] = kernels
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_compile_at, range(len(kernels)))


def compile_for(recorded: Recorded, architecture: int) -> Compiled:
    """Compiles and reads registers, local memory (spills) and shared memory."""
    kernel = recorded.kernel
    names = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=recorded.signature,
        constexprs={names[name]: value for name, value in recorded.constants.items()},
        attrs={names[name]: [["tt.divisibility", 16]] for name in recorded.divisible},
    )
    started = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": recorded.warps,
            "num_stages": recorded.stages,
            "maxnreg": recorded.registers,
        },
    )
    seconds = time.perf_counter() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        registers, local = _resources(file.name)
        unwritten = unwritten_uniform_registers(_cuobjdump("-sass", file.name))
    shared = compiled.metadata.shared
    problem = ""
    if shared > SHARED_MEMORY_BYTES[architecture]:
        problem = f"{shared} bytes of shared memory, {SHARED_MEMORY_BYTES[architecture]} are there"
    elif unwritten:
        problem = f"reads a uniform register that nothing wrote: {unwritten[0]}"
    elif local > SPILLED_BYTES:
        problem = f"{local} bytes of registers spilled to local memory"
    shown = " ".join(
        f"{name}={value}" for name, value in recorded.constants.items() if name.isupper()
    )
    shown += f" warps={recorded.warps} stages={recorded.stages}"
    return Compiled(
        kernel.fn.__name__, shown, architecture, registers, local, shared, seconds, problem,
    )  # fmt: skip


def _resources(cubin: str) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory (stack and spills)."""
    text = _cuobjdump("-res-usage", cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert match is not None, text
    return int(match[1]), int(match[2]) + int(match[3])


def _cuobjdump(option: str, path: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def unwritten_uniform_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register which no instruction before them writes.

    ptxas 12.8 builds such code for Hopper where one shared-memory offset serves two matrix
    descriptors of different swizzles: the second descriptor is then whatever the register held.
    Results may look right, or a launch ends in an illegal address.
    """
    written: set[int] = set()
    found = []
    for match in re.finditer(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE):
        instruction = re.sub(r"^@!?U?P\w+\s+", "", match[1]).strip()
        name, _, rest = instruction.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        target = None
        if re.match(r"U|R2UR|S2UR|LDCU|REDUX", name):
            target = next((o for o in operands if not re.fullmatch(r"!?U?P\w+", o)), None)
        width = 4 if "128" in name else 2 if re.search(r"\.64|WIDE", name) else 1
        for operand in operands:
            if operand is target:
                continue
            for register in re.findall(r"\bUR(\d+)", operand):
                first = int(register)
                read = range(first, first + 1)
                if (
                    "gdesc" in operand
                ):  # four registers: A's descriptor, unused where A is in registers, and B's
                    read = range(first if operand is operands[1] else first + 2, first + 4)
                if not written.issuperset(read):
                    found.append(instruction)
        if target is not None and (register := re.fullmatch(r"UR(\d+)", target)):
            written.update(range(int(register[1]), int(register[1]) + width))
    return found
