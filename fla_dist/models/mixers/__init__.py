"""The mixer families by the name that a config's `layer_pattern` uses."""

from fla_dist.models.mixers.attention import Attention, SlidingWindowAttention
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.mixers.gla import GatedLinearAttention
from fla_dist.models.mixers.linear_attention import LinearAttention
from fla_dist.models.mixers.mamba import Mamba
from fla_dist.models.mixers.retention import Retention

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "gla": GatedLinearAttention,
    "linear_attention": LinearAttention,
    "mamba": Mamba,
    "retention": Retention,
    "sliding_window_attention": SlidingWindowAttention,
}

__all__ = ["MIXERS", "Mixer"]
