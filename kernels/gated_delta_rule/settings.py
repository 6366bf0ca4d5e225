"""Launch settings of the gated delta rule's kernels, keyed by (compute capability, K, V) for 16-bit
inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fla_dist.kernels.common.launch import Launch, padded

CHECKED = {
    *((torch.bfloat16, 64, v) for v in (64, 128, 256)),
    *((torch.bfloat16, 128, v) for v in (128, 256)),
    *((torch.bfloat16, 256, v) for v in (256, 512)),
}
"""(dtype, K, V), as blocks take them, at which the kernels were checked on a GPU (compute
capability 9.0); the reference serves others."""
SHORTEST = 512
"""Tokens below which the reference serves: where the final state's gradient outweighs the outputs',
the gradients of beta and g in the last chunk are small differences of large numbers that bf16 has
rounded, and short sequences have no more."""


@dataclass(frozen=True)
class Settings:
    """chunk: tokens.  prepare: of the chunks, keys in blocks.  summarize, output: of the walks that
    hold blocks of V; summarize_gradient, value_gradient: of those back.  key_gradient: of the
    chunks, blocks of K each.  programs: segments times heads, about; where heads alone are as many,
    each is one segment.
    """

    chunk: int
    prepare: Launch
    summarize: Launch
    output: Launch
    summarize_gradient: Launch
    value_gradient: Launch
    key_gradient: Launch
    programs: int = 128


_WIDE_WALK = Launch(128, 8, 2)
TUNED: dict[tuple[int, int, int], Settings] = {
    (90, 128, 128): Settings(
        64, Launch(128, 4, 1, 168), Launch(64, 4, 2), _WIDE_WALK, Launch(128, 8, 3), _WIDE_WALK,
        Launch(64, 4, 2),
    ),
}  # fmt: skip


def settings(capability: int, key_size: int, value_size: int, itemsize: int) -> Settings:
    """Of the table, or by a rule that keeps each program's state near 32 KiB of registers."""
    if itemsize == 2 and (capability, key_size, value_size) in TUNED:
        return TUNED[capability, key_size, value_size]
    wide = max(padded(key_size, itemsize), padded(value_size, itemsize))
    prepare = Launch(64 if itemsize == 4 else 128, 4, 1)
    if itemsize == 4:
        chunk, walk = (32, Launch(32, 4, 1)) if wide <= 64 else (16, Launch(16, 4, 1))
        keys = walk
    else:
        chunk, keys = 64, Launch(64 if capability >= 90 else 32, 4, 2)  # six sums in registers
        narrow = Launch(64, 4 if capability >= 90 else 8, 1)
        walk = narrow if wide <= 128 else Launch(32, 8, 1)
    return Settings(chunk, prepare, walk, walk, walk, walk, keys)
