"""A whole config small enough for tests."""

from __future__ import annotations

from typing import Any

from fla_dist.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeepSpeedConfig,
    LoggingConfig,
    LRSchedulerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
    ZeroConfig,
)


def tiny_run(
    model: ModelConfig,
    *,
    sequence_length: int,
    sequence_parallel_size: int = 1,
    zero: ZeroConfig = ZeroConfig(),  # noqa: B008 (frozen)
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float = 0.0,
    **optimizer: Any,
) -> Config:
    return Config(
        model=model,
        tokenizer=TokenizerConfig(path="tokenizer.json"),
        data=DataConfig(sources=(SourceConfig("text"),), sequence_length=sequence_length),
        training=TrainingConfig(max_steps=8),
        optimizer=OptimizerConfig(**{"lr": 0.1, **optimizer}),
        checkpoint=CheckpointConfig(dir="checkpoints"),
        logging=LoggingConfig(dir="run"),
        lr_scheduler=LRSchedulerConfig(type="constant"),
        parallelism=ParallelismConfig(sequence_parallel_size),
        deepspeed=DeepSpeedConfig(
            train_micro_batch_size_per_gpu=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clipping=gradient_clipping,
            zero_optimization=zero,
        ),
    )
