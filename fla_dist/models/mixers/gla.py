"""Gated linear attention (arXiv:2312.06635, section 4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.gla import gla
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""


@dataclass(frozen=True)
class GLAConfig:
    """Keys of width expand_k · hidden_size, values of expand_v · hidden_size, divided over the
    heads."""

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0


class GatedLinearAttention(Mixer):
    config_class = GLAConfig

    def __init__(self, hidden_size: int, config: GLAConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        key_width, value_width = (
            int(config.expand_k * hidden_size),
            int(config.expand_v * hidden_size),
        )
        self.num_heads, self.gate_normalizer = config.num_heads, config.gate_normalizer
        self.widths = [key_width, key_width, value_width, value_width, config.gate_rank]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.gate = nn.Linear(config.gate_rank, key_width, bias=True)
        self.norm = RMSNorm(value_width // config.num_heads, norm_eps)
        self.output = nn.Linear(value_width, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        q, k, v, output_gate, low_rank = self.input(normed).split(self.widths, dim=-1)
        g = F.logsigmoid(self.gate(low_rank).to(self.norm.weight.dtype)) / self.gate_normalizer
        q, k, v, g = (rearrange(y, "b t (h k) -> b t h k", h=self.num_heads) for y in (q, k, v, g))
        o, state = gla(
            q, k, v, g,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        o = rearrange(self.norm(o), "b t h v -> b t (h v)")
        return self.output(o * F.silu(output_gate))

    def flops_per_token(self, sequence_length: int) -> float:
        # Between chunks k v and q S of K x V each a head, inside one the causal half of C x C
        # scores and their use.
        key_size, value_size = (self.widths[i] // self.num_heads for i in (0, 2))
        return self.num_heads * (4 * key_size * value_size + CHUNK * (key_size + value_size))

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        for key in ("expand_k", "expand_v"):
            width = getattr(config, key) * hidden_size
            if width < config.num_heads or width % config.num_heads:
                return (
                    f"{key}: gives a width of {width:g}, expected a multiple of num_heads "
                    f"({config.num_heads})"
                )
        return None
