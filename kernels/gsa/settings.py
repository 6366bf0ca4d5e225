"""Launch settings of GSA's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fla_dist.kernels.common.launch import Launch, padded

CHECKED = {
    *(
        (torch.bfloat16, k, v)
        for k in (64, 128, 256)
        for v in (64, 128, 256)
        if (k, v) != (256, 64)
    ),
    (torch.bfloat16, 512, 512),
    *((dtype, 128, 128) for dtype in (torch.float16, torch.float32)),
}
"""(dtype, K, V), in bf16 as blocks take them, at which the kernels passed `python -m
tests.kernels.gpu.check_gsa` on a GPU (compute capability 9.0); the reference serves others."""
SLOTS = 64
"""With so many."""
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
def settings(key_size: int, value_size: int, slots: int, itemsize: int) -> Settings:
    """By a rule: a program walks with all slots of a whole head, or, where columns of the state do
    not depend on each other, of some columns of it."""
    if itemsize == 4:
        walk, blocks, pairs = Launch(32, 8, 1), Launch(32, 4, 1), Launch(32, 4, 1)
        return Settings(16, pairs, blocks, walk, pairs, blocks, walk, pairs)
    narrow = max(key_size, value_size) <= 128
    if padded(slots, itemsize) <= 64:
        walk = Launch(128, 4, 3) if narrow else Launch(128, 8, 2)
        pairs, spread = Launch(64, 1, 1, 168), Launch(128, 4, 3)
    else:
        walk = Launch(128, 8, 2) if narrow else Launch(128, 16, 1)
        pairs, spread = Launch(64, 2, 1), Launch(64, 8, 2)
    scores, decays = Launch(64, 1, 1), Launch(32, 1, 1)
    return Settings(16, pairs, Launch(128, 4, 4), walk, scores, spread, walk, decays)
