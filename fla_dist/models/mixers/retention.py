"""Multi-scale retention (arXiv:2307.08621, section 2.2), RetNet's mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.retention import retention, retention_decay
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm
from fla_dist.models.mixers.attention import rotate
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""


@dataclass(frozen=True)
class RetentionConfig:
    """Queries and keys as wide as the hidden state, values of width expand_v · hidden_size, divided
    over the heads."""

    num_heads: int = 8
    expand_v: float = 2.0
    rope_theta: float = 10000.0


class Retention(Mixer):
    """Head h forgets by γ_h = 1 - 2^(-5-h) a token; positions enter by rotary embedding (Θ of
    equation 3). Heads are normalized by their root mean square, as the authors' code does."""

    config_class = RetentionConfig

    def __init__(self, hidden_size: int, config: RetentionConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        value_width = int(config.expand_v * hidden_size)
        self.num_heads, self.rope_theta = config.num_heads, config.rope_theta
        self.widths = [hidden_size, hidden_size, value_width, value_width]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.norm = RMSNorm(value_width // config.num_heads, norm_eps)
        self.output = nn.Linear(value_width, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        q, k, v, output_gate = self.input(normed).split(self.widths, dim=-1)
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", h=self.num_heads) for y in (q, k, v))
        q, k = (rotate(y, stream.positions, self.rope_theta) for y in (q, k))
        o, state = retention(
            q, k, v, retention_decay(self.num_heads, q.device),
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        o = rearrange(self.norm(o), "b t h v -> b t (h v)")
        return self.output(F.silu(output_gate) * o)

    def flops_per_token(self, sequence_length: int) -> float:
        # Between chunks k v and q S of K x V each a head, inside one the causal half of C x C
        # scores and their use.
        key_size, value_size = (self.widths[i] // self.num_heads for i in (0, 2))
        return self.num_heads * (4 * key_size * value_size + CHUNK * (key_size + value_size))

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.num_heads < 1 or hidden_size % (2 * config.num_heads):
            return (
                f"num_heads: {config.num_heads}, expected so many that the width {hidden_size} "
                "gives heads of an even size"
            )
        width = config.expand_v * hidden_size
        if width < config.num_heads or width % config.num_heads:
            return (
                f"expand_v: gives a width of {width:g}, expected a multiple of num_heads "
                f"({config.num_heads})"
            )
        return None
