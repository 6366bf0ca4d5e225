"""Launch settings of simple GLA's kernels, keyed by (compute capability, K, V) for 16-bit
inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fla_dist.kernels.common.launch import Launch, padded, read_tuned

CHECKED = {
    *((torch.bfloat16, 64, v) for v in (64, 128)),
    (torch.bfloat16, 128, 128),
    *((torch.bfloat16, 256, v) for v in (256, 512)),
    *((dtype, 64, 64) for dtype in (torch.float16, torch.float32)),
}
"""(dtype, K, V), in bf16 as blocks take them, at which the kernels were checked on a GPU (compute
capability 9.0); the reference serves others."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens.  output: of o and dv.  key_gradient: of dq and dk.  programs: as many as a
    launch needs to fill the GPU. longest: tokens of a segment at most.
    """

    chunk: int
    summarize: Launch
    output: Launch
    key_gradient: Launch
    programs: int = 1024
    longest: int = 1024


TUNED = read_tuned(Path(__file__).with_name("tuned.json"), Settings)


@lru_cache
def settings(capability: int, key_size: int, value_size: int, itemsize: int) -> Settings:
    """Of the table, or by a rule that keeps each program's state near 32 KiB of registers."""
    if itemsize == 2 and (capability, key_size, value_size) in TUNED:
        return TUNED[capability, key_size, value_size]
    wide = max(padded(key_size, itemsize), padded(value_size, itemsize))
    if itemsize == 4:
        chunk, launch = 32 if wide <= 64 else 16, Launch(32 if wide <= 256 else 16, 4, 1)
    elif wide <= 128 and capability < 90:
        chunk, launch = 32, Launch(32, 4, 2)
    elif wide <= 128:
        chunk, launch = 64, Launch(64, 4, 2)
    elif wide <= 256:
        # Blocks of 32 beside wider ones gave illegal addresses on Hopper: see `padded`.
        chunk, launch = 32, Launch(64 if capability >= 90 else 32, 8, 1)
    else:
        chunk, launch = 16 if capability >= 90 else 32, Launch(32, 8, 1)
    return Settings(chunk, launch, launch, launch)
