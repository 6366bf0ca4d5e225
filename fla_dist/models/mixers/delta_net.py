"""DeltaNet (arXiv:2406.06484, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.delta_rule import delta_rule
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm, ShortConvolution, l2_norm
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""


def delta_rule_flops(key_size: int, value_size: int) -> float:
    """Forward FLOPs a token and head of a chunked delta rule.

    Between chunks k v, w S and q S of K x V each; inside one the causal halves of the scores k k
    and q k, of the triangular system's K + V columns, and of the scores' use.
    """
    return 6 * key_size * value_size + CHUNK * (3 * key_size + 2 * value_size)


@dataclass(frozen=True)
class DeltaNetConfig:
    """Keys and values as wide as the hidden state, divided over the heads.

    allow_negative_eigenvalues: beta up to 2 instead of 1 (arXiv:2411.12537).
    """

    num_heads: int = 16
    conv_kernel: int = 4
    allow_negative_eigenvalues: bool = False


class DeltaNet(Mixer):
    config_class = DeltaNetConfig

    def __init__(self, hidden_size: int, config: DeltaNetConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.num_heads = config.num_heads
        self.beta_max = 2.0 if config.allow_negative_eigenvalues else 1.0
        self.widths = [3 * hidden_size, config.num_heads]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.convolution = ShortConvolution(3 * hidden_size, config.conv_kernel)
        self.norm = RMSNorm(hidden_size // config.num_heads, norm_eps)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        qkv, beta = self.input(normed).split(self.widths, dim=-1)
        before = self.convolution.before(qkv, stream)
        beta = self.beta_max * beta.to(self.norm.weight.dtype).sigmoid()
        qkv = self.convolution(qkv, before, stream)
        q, k, v = rearrange(qkv, "b t (n h k) -> n b t h k", n=3, h=self.num_heads)
        o, state = delta_rule(
            l2_norm(q), l2_norm(k), v, beta,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(rearrange(self.norm(o), "b t h v -> b t (h v)"))

    def flops_per_token(self, sequence_length: int) -> float:
        size = self.output.in_features // self.num_heads
        return self.num_heads * delta_rule_flops(size, size) + 2 * self.convolution.weight.numel()

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.num_heads < 1 or hidden_size % config.num_heads:
            return f"num_heads: {config.num_heads}, expected a divisor of the width {hidden_size}"
        if config.conv_kernel < 1:
            return f"conv_kernel: {config.conv_kernel}, expected at least 1"
        return None

    def initialize(self) -> None:
        self.convolution.initialize()
