"""Linear attention (arXiv:2006.16236) with its heads normalized (arXiv:2210.10340, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.retention import linear_attention
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Queries, keys and values as wide as the hidden state, divided over the heads."""

    num_heads: int = 16


class LinearAttention(Mixer):
    """φ(q) Σ φ(k)ᵀ v with φ(x) = elu(x) + 1; a norm a head takes the place of the sum of weights
    that attention divides by."""

    config_class = LinearAttentionConfig

    def __init__(self, hidden_size: int, config: LinearAttentionConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.num_heads, self.head_size = config.num_heads, hidden_size // config.num_heads
        self.qkv = NormedLinear(hidden_size, 3 * hidden_size)
        self.norm = RMSNorm(self.head_size, norm_eps)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        q, k, v = rearrange(self.qkv(normed), "b t (n h k) -> n b t h k", n=3, h=self.num_heads)
        o, state = linear_attention(
            F.elu(q) + 1, F.elu(k) + 1, v,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(rearrange(self.norm(o), "b t h v -> b t (h v)"))

    def flops_per_token(self, sequence_length: int) -> float:
        # Between chunks k v and q S a head, inside one the causal half of C x C scores and their
        # use.
        return self.num_heads * (4 * self.head_size**2 + 2 * CHUNK * self.head_size)

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.num_heads < 1 or hidden_size % config.num_heads:
            return f"num_heads: {config.num_heads}, expected a divisor of the width {hidden_size}"
        return None
