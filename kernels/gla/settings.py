"""Launch settings of GLA's kernels, keyed by (compute capability, K, V) for 16-bit inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fla_dist.kernels.common.launch import Launch, padded, read_tuned

CHECKED = {
    *((torch.bfloat16, size, size) for size in (64, 128, 256)),
    (torch.bfloat16, 256, 512),
    *(
        (dtype, *sizes)
        for dtype in (torch.float16, torch.float32)
        for sizes in ((24, 40), (64, 64), (128, 128))
    ),
}
"""(dtype, K, V), in bf16 as blocks take them, at which the kernels were checked on a GPU (compute
capability 9.0); the reference serves others."""


@dataclass(frozen=True)
class Settings:
    """key_gradient: with a block of all keys and values it computes dk and dv, else dk.  programs:
    segments of all heads, as many as fill the GPU.  longest: tokens of a segment at most."""

    prepare: Launch
    summarize: Launch
    output: Launch
    query_gradient: Launch
    key_gradient: Launch
    pair_gradient: Launch
    programs: int = 256
    longest: int = 8192


TUNED = read_tuned(Path(__file__).with_name("tuned.json"), Settings)


@lru_cache
def settings(capability: int, key_size: int, value_size: int, itemsize: int) -> Settings:
    """Of the table, or by a rule that keeps each program's state near 32 KiB of registers."""
    if itemsize == 2 and (capability, key_size, value_size) in TUNED:
        return TUNED[capability, key_size, value_size]
    wide = max(padded(key_size, itemsize), padded(value_size, itemsize))
    if itemsize == 4:
        tile, walk = Launch(16, 4, 1), Launch(32 if wide <= 256 else 16, 8, 1)
        return Settings(tile, walk, walk, walk, walk, tile)
    tiles, summarize = Launch(16, 1, 2), Launch(64, 4, 4)
    if wide <= 128:
        walk, both = Launch(64, 4, 3), Launch(128, 8, 3)
    elif wide <= 256:
        walk = both = Launch(64, 8, 3)
    else:
        walk = both = Launch(32, 8, 3)
    output = Launch(16, 8, 2) if padded(key_size, itemsize) > 256 else walk
    return Settings(tiles, summarize, output, walk, both, tiles)
