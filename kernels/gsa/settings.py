"""Launch settings of GSA's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fla_dist.kernels.common.launch import Launch

CHECKED = {
    *((torch.bfloat16, 64, size, size) for size in (64, 128, 512)),
    *((dtype, 64, 128, 128) for dtype in (torch.float16, torch.float32)),
}
"""(dtype, M, K, V) at which the kernels passed `python -m tests.kernels.gpu.check_gsa` on a GPU
(compute capability 9.0); the reference serves others."""


SHORTEST = 16
"""Tokens below which the reference serves: of one token dq is 5.2e-3 off in bf16."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens.  programs: as many as a launch needs to fill the GPU.  longest: tokens of a
    segment at most."""

    chunk: int
    prepare: Launch
    summarize: Launch
    gather: Launch
    scores: Launch
    spread: Launch
    source_gradient: Launch
    decay_gradient: Launch
    programs: int = 512
    longest: int = 1024


@lru_cache
def settings(key_size: int, value_size: int, itemsize: int) -> Settings:
    """By a rule: a program walks with 64 slots of a whole head, or, where columns of the state do
    not depend on each other, of 128 columns of it."""
    if itemsize == 4:
        walk, blocks, pairs = Launch(32, 8, 1), Launch(32, 4, 1), Launch(32, 4, 1)
        return Settings(16, pairs, blocks, walk, pairs, blocks, walk, pairs)
    walk = Launch(128, 4, 3) if max(key_size, value_size) <= 128 else Launch(128, 8, 2)
    pairs, scores, decays = Launch(64, 1, 1, 168), Launch(64, 1, 1), Launch(32, 1, 1)
    return Settings(16, pairs, Launch(128, 4, 4), walk, scores, Launch(128, 4, 3), walk, decays)
