"""AdamW, which parameters decay, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fla_dist.config import LRSchedulerConfig, OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; gains, biases and what is marked `_no_weight_decay` without."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips, and that skips a step whose gradient is not finite.

    DeepSpeed's ZeRO 1-3 do both themselves. At ZeRO 0 in fp32 it reports no norm and would write
    NaN into the weights, but it hands on the norm of whatever optimizer it is given. The fused
    update reads both decisions on the GPU, so that the host goes on to the next step: it divides
    gradients by `grad_scale`, and does nothing where `found_inf` is 1.
    """

    def __init__(self, groups: list[dict[str, Any]], max_norm: float, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._max_norm = max_norm
        self._global_grad_norm: Tensor | float = 0.0
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        parameters = (p for group in self.param_groups for p in group["params"])
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm
        self.found_inf = (~norm.isfinite()).float()
        if self._max_norm > 0:
            self.grad_scale = (norm / self._max_norm).float().clamp(min=1.0)
        super().step()


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, max_norm: float | None
) -> torch.optim.Optimizer:
    """AdamW over the model's parameters; with `max_norm`, one that also clips to it (0: never)."""
    groups = parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
    }
    if max_norm is None:
        return torch.optim.AdamW(groups, fused=True, **settings)
    return ClippingAdamW(groups, max_norm, **settings)


def learning_rate(step: int, total_steps: int, peak: float, config: LRSchedulerConfig) -> float:
    """The learning rate of `step` (counted from 0): linear warmup to the peak, then by type.

    cosine: half a cosine down to min_lr_ratio · peak at the last step. wsd: the peak until the last
    decay_ratio of all steps, then a line down. constant: the peak.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil((config.warmup_ratio or 0.0) * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.type == "cosine":
        progress = (step - warmup) / max(1, total_steps - 1 - warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.type == "wsd":
        decay_steps = math.ceil(config.decay_ratio * total_steps)
        progress = (step - (total_steps - 1 - decay_steps)) / max(1, decay_steps)
        return peak * (1 - (1 - floor) * min(1.0, max(0.0, progress)))
    return peak
