"""Softmax attention, full or over a sliding window, with grouped heads and rotary positions that
restart with each document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.attention import AttentionMask, attention
from fla_dist.kernels.attention.mask import BLOCK
from fla_dist.models.layers import Normed, NormedLinear
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
        self.qkv = NormedLinear(
            hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        )
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        # Two products: values are used as they come, and a view of one product would keep all of it
        # for the backward, beside the turned queries and keys.
        widths = [(heads + kv_heads) * self.head_size, kv_heads * self.head_size]
        qk, v = (
            rearrange(y, "b t (h k) -> b t h k", k=self.head_size)
            for y in normed.project(*self.qkv.weight.split(widths))
        )
        q, k = qk.split([heads, kv_heads], dim=2)
        cosine, sine = self._rotation(stream)
        q, k = turn(q, cosine, sine), turn(k, cosine, sine)
        if self.window_size is None:
            o = stream.full_attention("kv", q, k, v)
        else:
            k, v = stream.with_halo("kv", (k, v), halo_width(self.window_size))
            o = attention(q, k, v, self._window_mask(stream, self.window_size))
        return self.output(rearrange(o, "b t h k -> b t (h k)"))

    def prepare(self, stream: Stream) -> None:
        self._rotation(stream)
        if self.window_size is None:
            stream.exchange.prepare_attention(self.num_heads, self.num_kv_heads, stream)
        else:
            self._window_mask(stream, self.window_size)

    def _window_mask(self, stream: Stream, window_size: int) -> AttentionMask:
        return stream.attention_mask(window_size, stream.context(halo_width(window_size)))

    def _rotation(self, stream: Stream) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.qkv.weight.dtype, torch.float32)
        return stream.once(
            ("rotation", self.head_size, self.rope_theta),
            lambda: rotation(stream.positions, self.head_size, self.rope_theta, dtype),
        )

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


def halo_width(window_size: int) -> int:
    """Tokens before a slice that its queries are given: those of the window, and a few more where
    that makes whole blocks of keys."""
    width = window_size - 1
    return width if width < BLOCK else -(-width // BLOCK) * BLOCK


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (arXiv:2104.09864): halves of each head turned by position · theta^(-2i/K),
    in fp32.

    x: [B, T, H, K].  positions: [B, T].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return turn(x, *rotation(positions, x.shape[-1], theta, dtype))


def rotation(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of heads of `size` = K, [B, T, 1, K/2] each."""
    half = size // 2
    frequency = theta ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    angle = (positions.to(dtype)[..., None] * frequency)[:, :, None]
    return angle.cos(), angle.sin()


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The halves of each head of x [B, T, H, K] turned by angles."""
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
