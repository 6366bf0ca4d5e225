"""Launch settings of KDA's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fla_dist.kernels.common.launch import Launch, padded

CHECKED = {(torch.bfloat16, k, v) for k in (64, 128, 256) for v in (64, 128, 256)}
"""(dtype, K, V), as blocks take them, at which the kernels were checked on a GPU (compute
capability 9.0); the reference serves others."""
SHORTEST = 128
"""Tokens below which the reference serves: the gradient of one token's beta is a difference of
numbers that bf16 has rounded, 6e-3 off; among 100 tokens, one number of dg can be half of its norm,
and what the state in it loses in bf16 puts dg 5.1e-3 off."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens.  prepare, pairs: of the chunks, keys in blocks.  summarize, output: of the
    walks that hold blocks of V; summarize_gradient, value_gradient: of those back.  query_walk,
    key_walk: of those that hold blocks of K.  programs: segments times heads, about; where heads
    alone are as many, each is one segment.
    """

    chunk: int
    prepare: Launch
    summarize: Launch
    output: Launch
    summarize_gradient: Launch
    value_gradient: Launch
    query_walk: Launch
    key_walk: Launch
    pairs: Launch
    programs: int = 128


@lru_cache
def settings(capability: int, key_size: int, value_size: int, itemsize: int) -> Settings:
    """By a rule that keeps each program's state near 32 KiB of registers: walks over blocks of V
    hold all of K, those over blocks of K all of V."""
    key_width, value_width = padded(key_size, itemsize), padded(value_size, itemsize)
    wide = max(key_width, value_width)
    if itemsize == 4:
        prepare = pairs = Launch(32 if wide <= 256 else 16, 4, 2)
        forward = back = keys = Launch(32, 4, 1) if wide <= 64 else Launch(16, 8, 1)
    else:
        prepare = pairs = Launch(32, 1, 2)
        if capability >= 90:
            pairs = Launch(16, 1, 2, 168)
        forward, back, keys = (
            Launch(64, 4, 3) if width <= 128 else Launch(32, 8, 2)
            for width in (key_width, key_width, value_width)
        )
        if key_width <= 128 and capability >= 90:
            forward, back = Launch(64, 4, 3, 168), Launch(64, 4, 4)
    programs = 32 if min(key_width, value_width) > 128 else 128  # there are more blocks a head
    return Settings(16, prepare, forward, forward, back, back, keys, keys, pairs, programs)
