"""Launch settings of RWKV7's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fla_dist.kernels.common.launch import Launch, padded

CHECKED = {
    *(
        (torch.bfloat16, k, v)
        for k in (64, 128, 256)
        for v in (64, 128, 256)
        if (k, v) != (256, 64)
    ),
    *((dtype, size, size) for dtype in (torch.float16, torch.float32) for size in (64, 128)),
}
"""(dtype, K, V), in bf16 as blocks take them, at which the kernels were checked on a GPU (compute
capability 9.0); the reference serves others."""
SHORTEST = 16
"""Tokens below which the reference serves: in a chunk that nothing enters, the gradient of the
first decay is 0, and the kernels would give what rounding leaves of a difference."""


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


def settings(key_size: int, value_size: int, dtype: torch.dtype) -> Settings:
    """A rule that keeps each program's state near 32 KiB of registers: walks over blocks of V hold
    all of K, those over blocks of K all of V."""
    if dtype == torch.float32:
        launch = Launch(16, 8, 1)
        return Settings(16, 512, launch, launch, launch, launch, launch)
    widths = [padded(size, dtype.itemsize) for size in (key_size, value_size)]
    values, keys = (Launch(64, 4, 3) if width <= 128 else Launch(32, 8, 2) for width in widths)
    programs = 32 if min(widths) > 128 else 128  # there are more blocks a head
    chunk = Launch(16, 1, 2)
    return Settings(16, 512, chunk, values, values, keys, chunk, programs)
