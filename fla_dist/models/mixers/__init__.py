"""The mixer families by the name that a config's `layer_pattern` uses."""

from fla_dist.models.mixers.attention import Attention, SlidingWindowAttention
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.mixers.gla import GatedLinearAttention
from fla_dist.models.mixers.mamba import Mamba

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "gla": GatedLinearAttention,
    "mamba": Mamba,
    "sliding_window_attention": SlidingWindowAttention,
}

__all__ = ["MIXERS", "Mixer"]
