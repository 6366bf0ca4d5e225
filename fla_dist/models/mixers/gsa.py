"""Gated slot attention (arXiv:2409.07146, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.gsa import gsa
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""


@dataclass(frozen=True)
class GSAConfig:
    """Queries, keys and values as wide as the hidden state, divided over the heads; slots a head.
    The forget gates are taken to the power 1 / gate_normalizer."""

    num_heads: int = 4
    num_slots: int = 64
    gate_normalizer: float = 8.0


class GatedSlotAttention(Mixer):
    config_class = GSAConfig

    def __init__(self, hidden_size: int, config: GSAConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.num_heads, self.num_slots = config.num_heads, config.num_slots
        self.gate_normalizer = config.gate_normalizer
        self.widths = [hidden_size, hidden_size, hidden_size, config.num_heads * config.num_slots]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        q, k, v, gate = self.input(normed).split(self.widths, dim=-1)
        g = F.logsigmoid(gate.to(self.norm.weight.dtype)) / self.gate_normalizer
        q, k, v, g = (
            rearrange(y, "b t (h k) -> b t h k", h=self.num_heads)
            for y in (F.silu(q), F.silu(k), F.silu(v), g)
        )
        o, state = gsa(
            q, k, v, g,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(self.norm(F.silu(rearrange(o, "b t h v -> b t (h v)"))))

    def flops_per_token(self, sequence_length: int) -> float:
        # Twice linear attention of keys or values with M slots: between chunks two products of
        # M x K a head, inside one the causal half of C x C scores and their use.
        head_size = self.output.in_features // self.num_heads
        one = 4 * self.num_slots * head_size + CHUNK * (self.num_slots + head_size)
        return 2 * self.num_heads * one

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.num_heads < 1 or hidden_size % config.num_heads:
            return f"num_heads: {config.num_heads}, expected a divisor of the width {hidden_size}"
        if config.num_slots < 1:
            return f"num_slots: {config.num_slots}, expected at least 1"
        if config.gate_normalizer <= 0:
            return f"gate_normalizer: {config.gate_normalizer}, expected above 0"
        return None
