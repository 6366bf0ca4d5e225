"""Mamba-2 (arXiv:2405.21060, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.mamba2 import state_space_dual
from fla_dist.models.layers import (
    Normed,
    NormedLinear,
    ShortConvolution,
    keep_fp32,
    time_step_bias_,
)
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""
A_MIN, A_MAX = 1.0, 16.0


@dataclass(frozen=True)
class Mamba2Config:
    """expand · hidden_size channels in heads of `head_size`, each head with a state of `state_size`
    times `head_size` numbers.

    num_groups: heads of a group share B and C, and the norm before the output is by group.
    """

    state_size: int = 128
    conv_kernel: int = 4
    expand: int = 2
    head_size: int = 64
    num_groups: int = 1


class Mamba2(Mixer):
    config_class = Mamba2Config

    def __init__(self, hidden_size: int, config: Mamba2Config, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        channels = config.expand * hidden_size
        heads = channels // config.head_size
        self.head_size, self.num_groups, self.norm_eps = (
            config.head_size,
            config.num_groups,
            norm_eps,
        )
        states = config.num_groups * config.state_size
        self.xBC_widths = [channels, states, states]
        self.widths = [channels, sum(self.xBC_widths), heads]
        self.input = NormedLinear(hidden_size, sum(self.widths))
        self.convolution = ShortConvolution(self.widths[1], config.conv_kernel, bias=True)
        self.time_step_bias = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.A_log = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.D = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.norm_weight = keep_fp32(nn.Parameter(torch.empty(channels)))
        self.output = nn.Linear(channels, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        z, xBC, time_step = self.input(normed).split(self.widths, dim=-1)
        xBC = self.convolution(xBC, self.convolution.before(xBC, stream), stream)
        x, B, C = xBC.split(self.xBC_widths, dim=-1)
        x = rearrange(x, "b t (h p) -> b t h p", p=self.head_size)
        B, C = (rearrange(y, "b t (g n) -> b t g n", g=self.num_groups) for y in (B, C))
        y, state = state_space_dual(
            x, time_step, -self.A_log.exp(), B, C, dt_bias=self.time_step_bias, D=self.D,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(self.gated_norm(y.flatten(2), z))

    def gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm of y ⊙ silu(z) over each group's channels, statistics in fp32."""
        wide = torch.promote_types(y.dtype, self.norm_weight.dtype)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.norm_eps).flatten(-2)
        return (normed * self.norm_weight).to(y.dtype)

    def flops_per_token(self, sequence_length: int) -> float:
        # Between chunks B x and C h of N x P each a head, inside one the causal half of C x C
        # scores and their use.
        state_size = self.xBC_widths[1] // self.num_groups
        head = 4 * state_size * self.head_size + CHUNK * (state_size + self.head_size)
        return self.widths[2] * head + 2 * self.convolution.weight.numel()

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        for key in ("state_size", "conv_kernel", "expand", "head_size", "num_groups"):
            if getattr(config, key) < 1:
                return f"{key}: {getattr(config, key)}, expected at least 1"
        channels = config.expand * hidden_size
        if channels % config.head_size:
            return (
                f"head_size: {config.head_size}, expected a divisor of the {channels} channels "
                "(expand · hidden_size)"
            )
        heads = channels // config.head_size
        if heads % config.num_groups:
            return f"num_groups: {config.num_groups}, expected a divisor of the {heads} heads"
        return None

    def initialize(self) -> None:
        self.convolution.initialize()
        time_step_bias_(self.time_step_bias)
        with torch.no_grad():
            self.A_log.uniform_(A_MIN, A_MAX).log_()
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)
