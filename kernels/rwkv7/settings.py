"""Launch settings of RWKV7's kernels, keyed by (compute capability, K, V) for 16-bit inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fla_dist.kernels.common.launch import Launch, padded

CHECKED: set[tuple[torch.dtype, int, int]] = set()
"""(dtype, K, V) at which the kernels were checked on a GPU (compute capability 9.0); the reference
serves others."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens.  stretch: tokens between two states that are kept for the gradients.  prepare,
    pair_gradient: blocks of K.  summarize, value_walk: blocks of V; key_walk: of K.  programs:
    segments times heads, about; where heads alone are as many, each is one segment.
    """

    chunk: int
    stretch: int
    prepare: Launch
    summarize: Launch
    value_walk: Launch
    key_walk: Launch
    pair_gradient: Launch
    programs: int = 128


TUNED: dict[tuple[int, int, int], Settings] = {}


def settings(capability: int, key_size: int, value_size: int, itemsize: int) -> Settings:
    """Of the table, or by a rule that keeps each program's state near 32 KiB of registers."""
    if itemsize == 2 and (capability, key_size, value_size) in TUNED:
        return TUNED[capability, key_size, value_size]
    wide = max(padded(key_size, itemsize), padded(value_size, itemsize))
    if itemsize == 4:
        launch = Launch(16, 4, 1)
        return Settings(16, 512, launch, launch, launch, launch, launch)
    chunk = Launch(16, 1, 1)
    walk = Launch(64, 4, 3) if wide <= 128 else Launch(64, 8, 1)
    return Settings(16, 512, chunk, walk, walk, walk, chunk)
