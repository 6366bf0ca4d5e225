"""Launch settings of Mamba-2's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fla_dist.kernels.common.launch import Launch

CHECKED = {(torch.bfloat16, n, 64) for n in (128, 256)}
"""(dtype, N, P), as blocks take them, at which the kernels were checked on a GPU (compute
capability 9.0); simple GLA serves others."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens, at most 64.  heads: side by side in a walk, at most.  walk: of the segments'
    states, over `heads` times its block columns.  borders: of the chunks' states.  output: of y.
    value_gradient: of x, Δ and D.  shared_gradient: of B and C.  together: heads share B and C, and
    a program takes as many of them as leave so many programs, of output and of the gradients.
    programs: as many as walks need to fill the GPU.  longest: tokens of a segment at most.
    """

    chunk: int
    walk: Launch
    borders: Launch
    output: Launch
    value_gradient: Launch
    shared_gradient: Launch
    heads: int = 2
    together: tuple[int, int] = (2048, 2048)
    programs: int = 512
    longest: int = 4096


@lru_cache
def settings(capability: int, size: int, width: int, itemsize: int) -> Settings:
    """By a rule that lets states and the pairs of a chunk fit in registers. Chunks of 128 tokens do
    not: the gradient of x spills."""
    if itemsize == 4:
        launch = Launch(32, 4, 1)
        return Settings(16, launch, launch, launch, launch, launch, heads=1)
    walk = Launch(128, 8, 2)
    launch = Launch(64, 4 if size <= 128 else 8, 2)
    return Settings(64 if capability >= 90 else 32, walk, walk, launch, launch, launch)
