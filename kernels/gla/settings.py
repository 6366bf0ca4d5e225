"""Launch settings of GLA's kernels, keyed by (compute capability, K, V) for 16-bit inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fla_dist.kernels.common.launch import Launch, padded, read_tuned

_SMALL = ((24, 40), (64, 64), (128, 128))
CHECKED = {
    *((torch.bfloat16, *sizes) for sizes in (*_SMALL, (256, 256), (256, 512))),
    *((torch.float32, *sizes) for sizes in _SMALL),
}
"""(dtype, K, V) at which the kernels were checked on a GPU; the reference serves others."""
SHORTEST = 512
"""Tokens below which the reference serves: where the final state's gradient outweighs the outputs',
what it gives the decays of the last chunk is the small difference of two large numbers that bf16
has rounded, and short sequences have no more."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens.  programs: as many as a launch needs to fill the GPU.  longest: tokens of a
    segment at most; the decay's gradient gathers the rounding of states along a segment."""

    chunk: int
    prepare: Launch
    summarize: Launch
    value_walk: Launch
    key_walk: Launch
    pair_gradient: Launch
    programs: int = 1024
    longest: int = 128


TUNED = read_tuned(Path(__file__).with_name("tuned.json"), Settings)


@lru_cache
def settings(capability: int, key_size: int, value_size: int, itemsize: int) -> Settings:
    """Of the table, or by a rule that keeps each program's state near 32 KiB of registers."""
    if itemsize == 2 and (capability, key_size, value_size) in TUNED:
        return TUNED[capability, key_size, value_size]
    wide = max(padded(key_size, itemsize), padded(value_size, itemsize))
    if itemsize == 4:
        launch = Launch(32 if wide <= 256 else 16, 4, 1)
        return Settings(16, launch, launch, launch, launch, launch)
    pairs, summarize = Launch(32, 1, 1), Launch(64, 4, 4)
    if wide <= 128:
        walk = Launch(64, 4, 3, 168 if capability == 90 else None)
    elif wide <= 256:
        walk = Launch(64, 8, 3)
    else:
        walk = Launch(32, 8, 3)
    return Settings(16, pairs, summarize, walk, walk, pairs)
