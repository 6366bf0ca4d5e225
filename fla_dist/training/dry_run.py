"""What a config amounts to, without a GPU and without allocating the model."""

from __future__ import annotations

from collections import Counter

import torch

from fla_dist.config import Config, ConfigError
from fla_dist.models import LanguageModel
from fla_dist.models.stream import Stream
from fla_dist.parallel.cost import Cost, CountingExchange, Links
from fla_dist.parallel.mesh import Mesh, choose_state_exchange
from fla_dist.parallel.slices import slice_lengths
from fla_dist.training.plan import BatchPlan, plan_batches

FLOPS_PER_SECOND = 250e12
"""Of a GPU in training, assumed: what a 1.3B linear-attention model reaches in bf16 at 33 µs a
token."""
WARN_FROM = 0.1
"""The exchange's share of a step from which it is worth a warning."""


def describe_run(
    config: Config,
    world_size: int,
    *,
    ranks_per_host: int = 8,
    links: Links = Links(),  # noqa: B008 (frozen)
) -> str:
    """The batch arithmetic on `world_size` ranks, the parameters by kind of layer, and what
    sequence parallelism sends.

    Raises:
        ConfigError: the config cannot run on that many ranks or such hosts.
    """
    plan = plan_batches(config, world_size)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    length = config.data.sequence_length
    longest = max(slice_lengths(length, plan.sequence_parallel_size))
    rows: list[tuple[str, str]] = [
        ("ranks", f"{world_size} = {plan.data_parallel_size} data x "
         f"{plan.sequence_parallel_size} sequence"),
        ("tokens a rank and micro batch",
         f"{plan.micro_batch_size} x {longest:,}"),
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
    if plan.sequence_parallel_size > 1:
        compute = model.flops_per_token(length) * plan.tokens_per_step / world_size
        costs = exchange_costs(config, plan, model, ranks_per_host, links)
        rows += exchange_rows(costs, compute / FLOPS_PER_SECOND)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def exchange_costs(
    config: Config, plan: BatchPlan, model: LanguageModel, ranks_per_host: int, links: Links
) -> dict[str, Cost]:
    """What a rank receives from those of its sequences in a step, by kind."""
    size, parallelism = plan.sequence_parallel_size, config.parallelism
    hosts = min(ranks_per_host, plan.world_size)
    try:
        exchange = choose_state_exchange(parallelism.state_exchange, size, hosts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    chosen = parallelism.attention_exchange
    mesh = Mesh(
        world_size=plan.world_size,
        sequence_parallel_size=size,
        ranks_per_host=hosts,
        state_exchange=exchange,
        attention_exchange=None if chosen == "auto" else chosen,
    )
    counting = CountingExchange(mesh, links, 2 if config.deepspeed.torch_autocast.enabled else 4)
    shape = (plan.micro_batch_size, max(slice_lengths(config.data.sequence_length, size)))
    with torch.device("meta"), torch.no_grad():
        positions = torch.empty(shape, dtype=torch.int32)
        stream = Stream(positions, positions, counting)
        x = model.embedding(positions)
        for block in model.blocks:
            x = block(x, stream)
    times = plan.gradient_accumulation_steps
    return {what: cost * times for what, cost in counting.costs.items()}


def exchange_rows(costs: dict[str, Cost], compute_seconds: float) -> list[tuple[str, str]]:
    """Each kind, and the sum beside the step; with a warning where it is more than a tenth."""
    total = sum(costs.values(), Cost())
    rows = [
        (f"exchange a step: {what}", f"{cost.received_bytes / 2**20:,.1f} MiB, {_ms(cost.seconds)}")
        for what, cost in costs.items()
    ]
    share = total.seconds / compute_seconds
    rows += [
        ("exchange a step", f"{total.received_bytes / 2**20:,.1f} MiB, {_ms(total.seconds)} if "
         "nothing overlaps"),
        ("computing a step", f"{_ms(compute_seconds)} at {FLOPS_PER_SECOND / 1e12:g} TFLOP/s"),
    ]  # fmt: skip
    if share > WARN_FROM:
        rows.append(("warning", f"the exchange is {share:.0%} of the computing; longer slices, "
                     "fewer sequence-parallel ranks or hosts make it less"))  # fmt: skip
    return rows


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


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
