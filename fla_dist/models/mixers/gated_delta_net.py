"""Gated DeltaNet (arXiv:2412.06464, section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.gated_delta_rule import gated_delta_rule
from fla_dist.models.layers import (
    Normed,
    NormedLinear,
    RMSNorm,
    ShortConvolution,
    keep_fp32,
    l2_norm,
    time_step_bias_,
)
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.mixers.delta_net import delta_rule_flops
from fla_dist.models.stream import Stream

A_MAX = 16.0


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Keys of `head_size` numbers a head, values of expand_v · head_size.

    num_value_heads: a multiple of num_heads; several value heads share the key of one.
    allow_negative_eigenvalues: beta up to 2 instead of 1 (arXiv:2411.12537).
    """

    num_heads: int = 6
    num_value_heads: int = 6
    head_size: int = 256
    expand_v: float = 2.0
    conv_kernel: int = 4
    allow_negative_eigenvalues: bool = False


class GatedDeltaNet(Mixer):
    config_class = GatedDeltaNetConfig

    def __init__(self, hidden_size: int, config: GatedDeltaNetConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        heads = config.num_value_heads
        self.head_size, self.value_size = config.head_size, int(config.expand_v * config.head_size)
        self.beta_max = 2.0 if config.allow_negative_eigenvalues else 1.0
        keys, values = config.num_heads * self.head_size, heads * self.value_size
        self.qkv_widths = [keys, keys, values]
        self.widths = [sum(self.qkv_widths), values, heads, heads]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.convolution = ShortConvolution(self.widths[0], config.conv_kernel)
        self.A_log = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.time_step_bias = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.norm = RMSNorm(self.value_size, norm_eps)
        self.output = nn.Linear(values, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        qkv, output_gate, beta, time_step = self.input(normed).split(self.widths, dim=-1)
        before = self.convolution.before(qkv, stream)
        dtype = self.A_log.dtype
        g = -self.A_log.exp() * F.softplus(time_step.to(dtype) + self.time_step_bias)
        beta = self.beta_max * beta.to(dtype).sigmoid()
        qkv = self.convolution(qkv, before, stream)
        q, k, v = qkv.split(self.qkv_widths, dim=-1)
        q, k = (l2_norm(rearrange(y, "b t (h k) -> b t h k", k=self.head_size)) for y in (q, k))
        v, output_gate = (
            rearrange(y, "b t (h v) -> b t h v", v=self.value_size) for y in (v, output_gate)
        )
        o, state = gated_delta_rule(
            q, k, v, g, beta,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(rearrange(self.norm(o) * F.silu(output_gate), "b t h v -> b t (h v)"))

    def flops_per_token(self, sequence_length: int) -> float:
        heads = self.A_log.numel()
        mixing = heads * delta_rule_flops(self.head_size, self.value_size)
        return mixing + 2 * self.convolution.weight.numel()

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        for key in ("num_heads", "head_size", "conv_kernel"):
            if getattr(config, key) < 1:
                return f"{key}: {getattr(config, key)}, expected at least 1"
        if config.num_value_heads < 1 or config.num_value_heads % config.num_heads:
            return (
                f"num_value_heads: {config.num_value_heads}, expected a multiple of num_heads "
                f"({config.num_heads})"
            )
        value_size = config.expand_v * config.head_size
        if value_size < 1 or value_size != int(value_size):
            return f"expand_v: gives values of {value_size:g} numbers, expected a whole number"
        return None

    def initialize(self) -> None:
        self.convolution.initialize()
        with torch.no_grad():
            self.A_log.copy_((A_MAX * (1 - torch.rand(self.A_log.shape))).log())
        time_step_bias_(self.time_step_bias)
