"""Launch settings: what a kernel is compiled with. Written down, never searched for at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """block: of the state's axis that programs divide among them.  warps, stages: Triton's."""

    block: int
    warps: int
    stages: int


def padded(size: int, itemsize: int) -> int:
    """A head size as Triton blocks take it: a power of two.

    Rows of 16-bit numbers are at least 128 bytes, so that all tiles of a kernel share one
    shared-memory swizzle: with two, ptxas 12.8 builds matrix descriptors for Hopper out of
    registers that it never wrote (see fla_dist.benchmark.compile_check).
    """
    return max(16 if itemsize == 4 else 64, triton.next_power_of_2(size))


def capability(tensor: Tensor) -> int:
    """90 for Hopper; 0 where there is no GPU (Triton's interpreter)."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def precision(x: Tensor) -> str:
    """How tl.dot multiplies: fp32 exactly, the others on tensor cores in their own type."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of the batch, the tokens and the heads; the last axis is contiguous."""
    return x.stride(0), x.stride(1), x.stride(2)
