"""Mamba-1 (arXiv:2312.00752), as Samba has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fla_dist.kernels.mamba import projected_selective_scan
from fla_dist.models.layers import (
    Normed,
    NormedLinear,
    ShortConvolution,
    keep_fp32,
    time_step_bias_,
)
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream


@dataclass(frozen=True)
class MambaConfig:
    """Channels D = expand · hidden_size, each with `state_size` numbers; Δ comes through
    `time_step_rank` (auto: ⌈hidden_size / 16⌉)."""

    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | Literal["auto"] = "auto"


class Mamba(Mixer):
    config_class = MambaConfig

    def __init__(self, hidden_size: int, config: MambaConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        channels = config.expand * hidden_size
        rank = -(-hidden_size // 16) if config.time_step_rank == "auto" else config.time_step_rank
        self.sizes = [rank, config.state_size, config.state_size]
        self.input = NormedLinear(hidden_size, 2 * channels)
        self.convolution = ShortConvolution(channels, config.conv_kernel, bias=True)
        self.x_projection = nn.Linear(channels, sum(self.sizes), bias=False)
        self.time_step_weight = nn.Parameter(torch.empty(channels, rank))
        self.time_step_bias = keep_fp32(nn.Parameter(torch.empty(channels)))
        self.A_log = keep_fp32(nn.Parameter(torch.empty(channels, config.state_size)))
        self.D = keep_fp32(nn.Parameter(torch.empty(channels)))
        self.output = nn.Linear(channels, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        # Two products, so that the gradients of x and z need not be joined for one.
        x, z = normed.project(*self.input.weight.chunk(2))
        x = self.convolution(x, self.convolution.before(x, stream), stream)
        time_step, B, C = self.x_projection(x).split(self.sizes, dim=-1)
        o, state = projected_selective_scan(
            x, time_step, -self.A_log.exp(), B, C,
            dt_weight=self.time_step_weight, dt_bias=self.time_step_bias, D=self.D, z=z,
            weight=self.output.weight, initial_state=stream.initial_state("state"),
            doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return o

    def flops_per_token(self, sequence_length: int) -> float:
        # A state number: its decay, the decay's exp and product, the input's product and sum, the
        # output's.
        channels, state_size = self.A_log.shape
        return 7 * channels * state_size + 2 * (
            self.convolution.weight.numel() + self.time_step_weight.numel()
        )

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        for key in ("state_size", "conv_kernel", "expand"):
            if getattr(config, key) < 1:
                return f"{key}: {getattr(config, key)}, expected at least 1"
        if config.time_step_rank != "auto" and config.time_step_rank < 1:
            return f'time_step_rank: {config.time_step_rank}, expected at least 1 or "auto"'
        return None

    def initialize(self) -> None:
        channels, state_size = self.A_log.shape
        self.convolution.initialize()
        bound = self.time_step_weight.shape[1] ** -0.5
        nn.init.uniform_(self.time_step_weight, -bound, bound)
        time_step_bias_(self.time_step_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, state_size + 1).log().expand(channels, -1))
        nn.init.ones_(self.D)
