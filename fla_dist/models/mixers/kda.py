"""Kimi delta attention (arXiv:2510.26692, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.kda import kda
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
class KDAConfig:
    """Keys and values of `head_size` numbers a head; decay and output gate come through
    projections of that rank."""

    num_heads: int = 16
    head_size: int = 128
    conv_kernel: int = 4


class KimiDeltaAttention(Mixer):
    config_class = KDAConfig

    def __init__(self, hidden_size: int, config: KDAConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.num_heads, size = config.num_heads, config.head_size
        width = config.num_heads * size
        self.widths = [3 * width, size, size, config.num_heads]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.convolution = ShortConvolution(3 * width, config.conv_kernel)
        self.decay = nn.Linear(size, width, bias=False)
        self.A_log = keep_fp32(nn.Parameter(torch.empty(config.num_heads)))
        self.time_step_bias = keep_fp32(nn.Parameter(torch.empty(width)))
        self.output_gate = nn.Linear(size, width, bias=True)
        self.norm = RMSNorm(size, norm_eps)
        self.output = nn.Linear(width, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        qkv, decay, output_gate, beta = self.input(normed).split(self.widths, dim=-1)
        before = self.convolution.before(qkv, stream)
        gate = self.output_gate(output_gate).sigmoid()
        dtype = self.A_log.dtype
        time_step = F.softplus(self.decay(decay).to(dtype) + self.time_step_bias)
        time_step = rearrange(time_step, "b t (h k) -> b t h k", h=self.num_heads)
        qkv = self.convolution(qkv, before, stream)
        q, k, v = rearrange(qkv, "b t (n h k) -> n b t h k", n=3, h=self.num_heads)
        o, state = kda(
            l2_norm(q), l2_norm(k), v, -self.A_log.exp()[:, None] * time_step,
            beta.to(dtype).sigmoid(),
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(rearrange(self.norm(o), "b t h v -> b t (h v)") * gate)

    def flops_per_token(self, sequence_length: int) -> float:
        size = self.norm.weight.numel()
        return self.num_heads * delta_rule_flops(size, size) + 2 * self.convolution.weight.numel()

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        for key in ("num_heads", "head_size", "conv_kernel"):
            if getattr(config, key) < 1:
                return f"{key}: {getattr(config, key)}, expected at least 1"
        return None

    def initialize(self) -> None:
        self.convolution.initialize()
        with torch.no_grad():
            self.A_log.copy_((1 + (A_MAX - 1) * torch.rand(self.A_log.shape)).log())
        time_step_bias_(self.time_step_bias)
