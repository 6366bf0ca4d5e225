"""RWKV6's time mixing (Finch, arXiv:2404.05892, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.rwkv6 import rwkv6
from fla_dist.models.layers import Normed, keep_fp32, token_shift
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""
INPUTS = 5
"""What is mixed of a token and the one before it: decay, key, value, receptance, gate."""


@dataclass(frozen=True)
class RWKV6Config:
    """Heads of `head_size` numbers; the ranks of the low-rank maps that give the shares of the
    token before, and the decay."""

    head_size: int = 64
    shift_rank: int = 32
    decay_rank: int = 64


class RWKV6(Mixer):
    config_class = RWKV6Config

    def __init__(self, hidden_size: int, config: RWKV6Config, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.head_size = config.head_size
        self.norm_eps = norm_eps * config.head_size

        def vector() -> nn.Parameter:
            return keep_fp32(nn.Parameter(torch.empty(hidden_size)))

        self.shift_down = nn.Linear(hidden_size, INPUTS * config.shift_rank, bias=False)
        self.shift_up = nn.Parameter(torch.empty(INPUTS, config.shift_rank, hidden_size))
        self.shift_input = vector()
        self.shift = keep_fp32(nn.Parameter(torch.empty(INPUTS, hidden_size)))
        self.decay_down = nn.Linear(hidden_size, config.decay_rank, bias=False)
        self.decay_up = nn.Linear(config.decay_rank, hidden_size, bias=False)
        self.decay_bias, self.bonus = vector(), vector()
        self.key, self.value, self.receptance, self.gate = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.norm_weight, self.norm_bias = vector(), vector()
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        x = normed.whole()
        x_w, x_k, x_v, x_r, x_g = self._mix_with_token_before(x, stream)
        decay = self.decay_up(self.decay_down(x_w).tanh())
        g = -(self.decay_bias + decay.to(self.decay_bias.dtype)).exp()
        r, k, v, g = (
            rearrange(y, "b t (h k) -> b t h k", k=self.head_size)
            for y in (self.receptance(x_r), self.key(x_k), self.value(x_v), g)
        )
        o, state = rwkv6(
            r, k, v, g, self.bonus.unflatten(0, (-1, self.head_size)),
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(self._norm(o).to(x.dtype) * F.silu(self.gate(x_g)))

    def _mix_with_token_before(self, x: Tensor, stream: Stream) -> list[Tensor]:
        """Equations 14 to 16: each input is x and its predecessor in shares that depend on both."""
        change = token_shift(x, stream) - x
        low_rank = self.shift_down(x + change * self.shift_input.to(x.dtype)).tanh()
        low_rank = low_rank.unflatten(-1, (INPUTS, -1))
        share = torch.einsum("btnr,nrd->nbtd", low_rank, self.shift_up)
        return [
            x + change * (mu + own).to(x.dtype) for mu, own in zip(self.shift, share, strict=True)
        ]

    def _norm(self, o: Tensor) -> Tensor:
        """[B, T, H, V] to [B, T, H·V], each head's mean and variance to 0 and 1, then gain and
        bias, in fp32."""
        rows = o.flatten(2).flatten(0, 1).to(self.norm_weight.dtype)
        heads = o.shape[2]
        rows = F.group_norm(rows, heads, self.norm_weight, self.norm_bias, self.norm_eps)
        return rows.unflatten(0, o.shape[:2])

    def flops_per_token(self, sequence_length: int) -> float:
        # Between chunks k v and r S a head, inside one the causal half of C x C scores and their
        # use; the shares' second product, which is no nn.Linear.
        mixing = self.output.in_features * (4 * self.head_size + 2 * CHUNK)
        return mixing + 2 * self.shift_up.numel()

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.head_size < 1 or hidden_size % config.head_size:
            return f"head_size: {config.head_size}, expected a divisor of the width {hidden_size}"
        for key in ("shift_rank", "decay_rank"):
            if getattr(config, key) < 1:
                return f"{key}: {getattr(config, key)}, expected at least 1"
        return None

    @torch.no_grad()
    def initialize(self) -> None:
        """As the authors' code: channels from long to short memory, deeper layers with less of the
        token before, low-rank maps that start at 0."""
        width = self.output.in_features
        channel = torch.arange(width) / width
        spread = torch.arange(width) / max(width - 1, 1)
        shallow = 1 - self.layer_index / self.num_layers
        depth = self.layer_index / max(self.num_layers - 1, 1)
        self.shift_input.copy_(1 - channel**shallow)
        for mu, power in zip(self.shift, (1.0, 1.0, 1.0, 0.5, 0.5), strict=True):
            mu.copy_(1 - channel ** (power * shallow))
        self.shift[2].sub_(0.3 * depth)
        self.decay_bias.copy_(-6 + 5 * spread ** (0.7 + 1.3 * depth))
        zigzag = 0.1 * ((torch.arange(width) + 1) % 3 - 1)
        self.bonus.copy_(depth * (1 - spread) + zigzag)
        for down in (self.shift_down, self.decay_down):
            nn.init.zeros_(down.weight)
        for up in (self.shift_up, self.decay_up.weight):
            nn.init.uniform_(up, -0.01, 0.01)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
