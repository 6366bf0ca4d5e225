"""Launch settings of GSA's kernels, keyed by (compute capability, M, K, V) for 16-bit inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fla_dist.kernels.common.launch import Launch

CHECKED: set[tuple[torch.dtype, int, int, int]] = set()
"""(dtype, M, K, V) at which the kernels were checked on a GPU (compute capability 9.0); the
reference serves others."""
SHORTEST = 512
"""Tokens below which the reference serves: see fla_dist.kernels.simple_gla.settings."""


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
    programs: int = 1024
    longest: int = 1024


TUNED: dict[tuple[int, int, int, int], Settings] = {}


@lru_cache
def settings(
    capability: int, slots: int, key_size: int, value_size: int, itemsize: int
) -> Settings:
    """Of the table, or by a rule."""
    if itemsize == 2 and (capability, slots, key_size, value_size) in TUNED:
        return TUNED[capability, slots, key_size, value_size]
    if itemsize == 4:
        launch = Launch(32, 4, 1)
        return Settings(16, launch, launch, launch, launch, launch, launch, launch)
    walk, pairs = Launch(128, 4, 3), Launch(32, 1, 1)
    return Settings(16, Launch(64, 2, 1), walk, walk, pairs, walk, walk, pairs)
