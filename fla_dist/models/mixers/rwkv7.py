"""RWKV7's time mixing (arXiv:2503.14456, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.rwkv7 import rwkv7
from fla_dist.models.layers import Normed, keep_fp32, l2_norm, token_shift
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.mixers.delta_net import delta_rule_flops
from fla_dist.models.stream import Stream

SLOWEST_LOG_DECAY = -math.exp(-0.5)


@dataclass(frozen=True)
class RWKV7Config:
    """Heads of `head_size` numbers; the ranks of the low-rank maps to decay, in-context learning
    rate, value residual and output gate."""

    head_size: int = 64
    decay_rank: int = 96
    learning_rate_rank: int = 96
    value_rank: int = 64
    gate_rank: int = 256


class RWKV7(Mixer):
    config_class = RWKV7Config

    def __init__(self, hidden_size: int, config: RWKV7Config, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.head_size = config.head_size
        self.norm_eps = norm_eps * config.head_size

        def low_rank(rank: int, activation: type[nn.Module]) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(hidden_size, rank, bias=False),
                activation(),
                nn.Linear(rank, hidden_size, bias=False),
            )

        def vector() -> nn.Parameter:
            return keep_fp32(nn.Parameter(torch.empty(hidden_size)))

        self.shift = keep_fp32(nn.Parameter(torch.empty(6, hidden_size)))
        self.receptance, self.key, self.value = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(3)
        )
        self.decay = low_rank(config.decay_rank, nn.Tanh)
        self.learning_rate = low_rank(config.learning_rate_rank, nn.Identity)
        self.value_residual = low_rank(config.value_rank, nn.Identity)
        self.gate = low_rank(config.gate_rank, nn.Sigmoid)
        self.decay_bias, self.learning_rate_bias, self.value_residual_bias = (
            vector() for _ in range(3)
        )
        self.removal_scale, self.replacement, self.bonus = (vector() for _ in range(3))
        self.norm_weight, self.norm_bias = vector(), vector()
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        x = normed.whole()
        change = token_shift(x, stream) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * mu.to(x.dtype) for mu in self.shift)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        dtype = self.shift.dtype
        decay = SLOWEST_LOG_DECAY * (self.decay_bias + self.decay(x_w).to(dtype)).sigmoid()
        rate = (self.learning_rate_bias + self.learning_rate(x_a).to(dtype)).sigmoid()
        # The first layer's values are mixed with themselves.
        first = stream.share("rwkv7 value", v)
        mixed = (self.value_residual_bias + self.value_residual(x_v).to(dtype)).sigmoid()
        v = torch.lerp(v, first, mixed.to(v.dtype))

        removed = (k * self.removal_scale).to(k.dtype)
        k = (k * (1 + (rate - 1) * self.replacement)).to(k.dtype)
        r, k, v, removed, decay, rate = (
            rearrange(y, "b t (h k) -> b t h k", k=self.head_size)
            for y in (r, k, v, removed, decay, rate)
        )
        removed = l2_norm(removed)
        o, state = rwkv7(
            r, decay, k, v, -removed, (removed * rate).to(r.dtype),
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        bonus = self.bonus.unflatten(0, (-1, self.head_size))
        o = self._norm(o) + (r * k * bonus).sum(dim=-1, keepdim=True) * v
        o = rearrange(o, "b t h v -> b t (h v)").to(x.dtype)
        return self.output(o * self.gate(x_g))

    def _norm(self, o: Tensor) -> Tensor:
        """Each head's mean and variance to 0 and 1, then gain and bias, in fp32."""
        o = F.layer_norm(o.to(self.shift.dtype), (self.head_size,), eps=self.norm_eps)
        weight, bias = (
            y.unflatten(0, (-1, self.head_size)) for y in (self.norm_weight, self.norm_bias)
        )
        return o * weight + bias

    def flops_per_token(self, sequence_length: int) -> float:
        heads = self.output.in_features // self.head_size
        return heads * delta_rule_flops(self.head_size, self.head_size)

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.head_size < 1 or hidden_size % config.head_size:
            return f"head_size: {config.head_size}, expected a divisor of the width {hidden_size}"
        for key in ("decay_rank", "learning_rate_rank", "value_rank", "gate_rank"):
            if getattr(config, key) < 1:
                return f"{key}: {getattr(config, key)}, expected at least 1"
        return None

    @torch.no_grad()
    def initialize(self) -> None:
        """Channels from short to long memory, deeper layers with less of the token before."""
        width = self.output.in_features
        channel = torch.arange(width) / width
        shallow = 1 - self.layer_index / self.num_layers
        depth = self.layer_index / max(self.num_layers - 1, 1)
        for mu, power in zip(self.shift, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            mu.copy_(1 - channel ** (power * shallow))
        spread = torch.arange(width) / max(width - 1, 1)
        self.decay_bias.copy_(-6.5 + 5 * spread ** (0.85 + depth**0.5))
        self.learning_rate_bias.zero_()
        self.value_residual_bias.fill_(1.0)
        self.removal_scale.fill_(0.85)
        self.replacement.fill_(1.0)
        self.bonus.zero_()
        self.norm_weight.fill_(1.0)
        self.norm_bias.zero_()
