"""Softmax attention, full or over a sliding window, with grouped heads and rotary positions that
restart with each document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.attention import attention
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream


@dataclass(frozen=True)
class AttentionConfig:
    """Full causal attention. Keys and values are shared by num_heads / num_kv_heads query heads."""

    num_heads: int = 16
    num_kv_heads: int = 16
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class SlidingWindowAttentionConfig:
    """Attention to the last `window_size` tokens, the query's own included."""

    num_heads: int = 16
    num_kv_heads: int = 16
    window_size: int = 2048
    rope_theta: float = 10000.0


class Attention(Mixer):
    config_class: ClassVar[type] = AttentionConfig
    window_size: int | None = None

    def __init__(
        self,
        hidden_size: int,
        config: AttentionConfig | SlidingWindowAttentionConfig,
        norm_eps: float,
    ) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_size = hidden_size // config.num_heads
        self.rope_theta = config.rope_theta
        self.qkv = nn.Linear(
            hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_size, bias=False
        )
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = rearrange(self.qkv(x), "b t (h k) -> b t h k", k=self.head_size)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        q, k = (
            rotate(q, stream.positions, self.rope_theta),
            rotate(k, stream.positions, self.rope_theta),
        )
        if self.window_size is None:
            o = stream.full_attention("kv", q, k, v)
        else:
            kv = torch.stack([k, v], dim=2)
            before = stream.before("kv", kv, self.window_size - 1)
            k, v = torch.cat([before, kv], dim=1).unbind(dim=2)
            o = attention(q, k, v, stream.attention_mask(self.window_size, before.shape[1]))
        return self.output(rearrange(o, "b t h k -> b t (h k)"))

    def prepare(self, stream: Stream) -> None:
        if self.window_size is None:
            stream.exchange.prepare_attention(self.num_heads, self.num_kv_heads, stream)
        else:
            stream.attention_mask(self.window_size, self.window_size - 1)

    def flops_per_token(self, sequence_length: int) -> float:
        window = min(self.window_size or sequence_length, sequence_length)
        keys = window - window * (window - 1) / (2 * sequence_length)  # the mean over the sequence
        return 4 * keys * self.num_heads * self.head_size

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if hidden_size % (2 * config.num_heads):
            return (
                f"num_heads: {config.num_heads}, expected so many that the width {hidden_size} "
                "gives heads of an even size"
            )
        if config.num_heads % config.num_kv_heads:
            return (
                f"num_kv_heads: {config.num_kv_heads}, expected a divisor of num_heads "
                f"({config.num_heads})"
            )
        return None


class SlidingWindowAttention(Attention):
    config_class = SlidingWindowAttentionConfig

    def __init__(
        self, hidden_size: int, config: SlidingWindowAttentionConfig, norm_eps: float
    ) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.window_size = config.window_size

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.window_size < 1:
            return f"window_size: {config.window_size}, expected at least 1"
        return Attention.problem(hidden_size, config)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (arXiv:2104.09864): halves of each head turned by position · theta^(-2i/K),
    in fp32.

    x: [B, T, H, K].  positions: [B, T].
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (positions.to(dtype)[..., None] * frequency)[:, :, None]  # [B, T, 1, K/2]
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.to(dtype).split(half, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
