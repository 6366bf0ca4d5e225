"""The batch arithmetic of a run: how one optimizer step's tokens are laid over the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fla_dist.config import Config, ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's tokens are laid over the ranks."""

    world_size: int
    sequence_parallel_size: int
    data_parallel_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequences_per_step: int
    tokens_per_step: int
    total_steps: int


def plan_batches(config: Config, world_size: int) -> BatchPlan:
    """`config` on `world_size` ranks; a ConfigError where its numbers do not come out whole."""
    sp = config.parallelism.sequence_parallel_size
    if world_size % sp:
        raise ConfigError(
            f"parallelism.sequence_parallel_size: {sp} does not divide the world size {world_size}"
        )
    micro_batch = config.deepspeed.train_micro_batch_size_per_gpu
    micro_tokens = config.data.sequence_length * micro_batch * (world_size // sp)
    accumulation = config.deepspeed.gradient_accumulation_steps
    if accumulation == "auto":
        batch_tokens = config.training.global_batch_tokens
        assert batch_tokens is not None
        if batch_tokens % micro_tokens:
            raise ConfigError(
                f"training.global_batch_tokens: {batch_tokens} is not a multiple of {micro_tokens} "
                f"= data.sequence_length {config.data.sequence_length} x "
                f"deepspeed.train_micro_batch_size_per_gpu {micro_batch} x "
                f"{world_size // sp} data-parallel ranks"
            )
        accumulation = batch_tokens // micro_tokens
    tokens_per_step = micro_tokens * accumulation
    total_steps = config.training.max_steps
    if total_steps is None:
        assert config.training.max_tokens is not None
        total_steps = math.ceil(config.training.max_tokens / tokens_per_step)
    return BatchPlan(
        world_size=world_size,
        sequence_parallel_size=sp,
        data_parallel_size=world_size // sp,
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        sequences_per_step=tokens_per_step // config.data.sequence_length,
        tokens_per_step=tokens_per_step,
        total_steps=total_steps,
    )
