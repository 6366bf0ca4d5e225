"""What a config amounts to, without a GPU and without allocating the model."""

from __future__ import annotations

from collections import Counter

import torch

from fla_dist.config import Config
from fla_dist.models import LanguageModel
from fla_dist.training.plan import plan_batches


def describe_run(config: Config, world_size: int) -> str:
    """The batch arithmetic on `world_size` ranks, and the parameters by kind of layer.

    Raises:
        ConfigError: the config cannot run on that many ranks.
    """
    plan = plan_batches(config, world_size)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    length = config.data.sequence_length
    rows: list[tuple[str, str]] = [
        ("ranks", f"{world_size} = {plan.data_parallel_size} data x "
         f"{plan.sequence_parallel_size} sequence"),
        ("tokens a rank and micro batch",
         f"{plan.micro_batch_size} x {length // plan.sequence_parallel_size:,}"),
        ("gradient accumulation steps", f"{plan.gradient_accumulation_steps}"),
        ("sequences a step", f"{plan.sequences_per_step:,} of {length:,} tokens"),
        ("tokens a step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.total_steps:,}"),
        ("tokens", f"{plan.total_steps * plan.tokens_per_step:,}"),
    ]  # fmt: skip
    counts = parameter_counts(model, config.model.layer_pattern)
    rows += [(f"parameters: {kind}", f"{count:,}") for kind, count in counts.items()]
    rows += [
        ("parameters", f"{sum(counts.values()):,}"),
        ("FLOPs a token, forward and backward", f"{model.flops_per_token(length):.4g}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def parameter_counts(model: LanguageModel, layer_pattern: tuple[str, ...]) -> Counter[str]:
    """Parameters by kind of layer, tied weights counted once; their sum is the whole."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        kind = parts[0]
        if kind == "blocks":
            kind = parts[2]
            if kind == "mixer":
                kind = layer_pattern[int(parts[1]) % len(layer_pattern)]
        counts["norm" if "norm" in kind else kind] += parameter.numel()
    return counts
