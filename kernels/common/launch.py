"""Launch settings: what a kernel is compiled with. Written down, never searched for at run time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

T = TypeVar("T")
LAUNCHES = 1000
"""Different launches of a kernel that are kept in mind."""


@dataclass(frozen=True)
class Launch:
    """block: of the state's axis that programs divide among them.  warps, stages: Triton's.
    registers: at most so many a thread, so that more programs fit; None for as many as it takes."""

    block: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """As keyword arguments of a kernel's launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def read_tuned(path: Path, kind: type[T]) -> dict[tuple[int, int, int], T]:
    """(compute capability, K, V) to a family's settings, of the table that `launch/benchmark.py
    tune` writes."""
    if not path.exists():
        return {}
    return {
        (row["capability"], row["K"], row["V"]): kind(
            **{
                name: Launch(*value) if isinstance(value, list) else value
                for name, value in row["settings"].items()
            }
        )
        for row in json.loads(path.read_text())
    }


def write_tuned(path: Path, tuned: dict[tuple[int, int, int], Any]) -> None:
    """Writes what `read_tuned` reads."""
    rows = [
        {
            "capability": capability, "K": key_size, "V": value_size,
            "settings": {
                field.name: list(astuple(value)) if isinstance(value, Launch) else value
                for field in fields(settings)
                for value in [getattr(settings, field.name)]
            },
        }
        for (capability, key_size, value_size), settings in sorted(tuned.items())
    ]  # fmt: skip
    path.write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n")


def padded(size: int, itemsize: int) -> int:
    """A head size as Triton blocks take it: a power of two.

    Rows of 16-bit numbers are at least 128 bytes, so that all tiles of a kernel share one
    shared-memory swizzle: with two, ptxas 12.8 builds matrix descriptors for Hopper out of
    registers that it never wrote (see fla_dist.benchmark.compile_check).
    """
    return max(16 if itemsize == 4 else 64, power_of_two(size))


def power_of_two(size: int) -> int:
    """The least one that is no less. (Triton's own takes the host longer than an allocation.)"""
    return 1 << (size - 1).bit_length()


def is_checked(x: Tensor, key_size: int, value_size: int, widths: Collection[Any]) -> bool:
    """Whether kernels were checked on such a GPU as x's: (dtype, K, V) is in `widths`, in bf16 as
    blocks take them. Sizes of one width differ by masks; rows must be whole numbers of 16 bytes."""
    itemsize = x.element_size()
    if capability(x) != 90 or key_size * itemsize % 16 or value_size * itemsize % 16:
        return False
    if x.dtype == torch.bfloat16:
        key_size, value_size = padded(key_size, itemsize), padded(value_size, itemsize)
    return (x.dtype, key_size, value_size) in widths


def capability(tensor: Tensor) -> int:
    """90 for Hopper; 0 where there is no GPU (Triton's interpreter)."""
    return _capability(tensor.device.index) if tensor.is_cuda else 0


@lru_cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Kernel:
    """A function of `triton.jit`, launched as that is: `kernel[grid](*arguments, **constants)`. A
    launch like one before goes straight to what was compiled for that one; Triton's own search
    takes the host 40 µs, as long as many a kernel runs."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._compiled: dict[Any, tuple[Any, tuple[str, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        key = (
            torch.cuda.current_device() if torch.cuda.is_initialized() else None,
            *[
                x if type(x) is int
                # What Triton compiles for, of an argument that is no integer.
                else (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor)
                else type(x)
                for x in arguments
            ],
            *constants,
            *constants.values(),
        )  # fmt: skip
        found = self._compiled.get(key)
        if found is None:
            compiled = self.jit[grid](*arguments, **constants)
            if isinstance(compiled, CompiledKernel):
                if len(self._compiled) >= LAUNCHES:  # of sequences of ever different lengths
                    self._compiled.clear()
                self._compiled[key] = compiled, tuple(self.jit.arg_names[len(arguments) :])
            return
        compiled, names = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in names])


class Step:
    """A function of tensors that is a torch.library op to whatever looks at ops (torch.compile,
    dispatch modes), and is called as it is otherwise: the op's way through the dispatcher takes the
    host longer than the launches it is for. Called where autograd does not record."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=())

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.op.register_fake(function)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.op(*arguments)
        return self.function(*arguments)


def step(name: str) -> Callable[[Callable[..., Any]], Step]:
    """Registers a step of an op under `name`."""
    return lambda function: Step(name, function)


def floats(like: Tensor, *shape: int) -> Tensor:
    """Room for fp32 numbers on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def precision(x: Tensor) -> str:
    """How tl.dot multiplies: fp32 exactly, the others on tensor cores in their own type."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of the batch, the tokens and the heads; the last axis is contiguous."""
    return x.stride(0), x.stride(1), x.stride(2)
