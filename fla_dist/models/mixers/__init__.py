"""The mixer families by the name that a config's `layer_pattern` uses."""

from fla_dist.models.mixers.attention import Attention, SlidingWindowAttention
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.mixers.delta_net import DeltaNet
from fla_dist.models.mixers.gated_delta_net import GatedDeltaNet
from fla_dist.models.mixers.gla import GatedLinearAttention
from fla_dist.models.mixers.gsa import GatedSlotAttention
from fla_dist.models.mixers.hgrn import HGRN
from fla_dist.models.mixers.hgrn2 import HGRN2
from fla_dist.models.mixers.kda import KimiDeltaAttention
from fla_dist.models.mixers.linear_attention import LinearAttention
from fla_dist.models.mixers.mamba import Mamba
from fla_dist.models.mixers.mamba2 import Mamba2
from fla_dist.models.mixers.retention import Retention
from fla_dist.models.mixers.rwkv6 import RWKV6
from fla_dist.models.mixers.rwkv7 import RWKV7

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gla": GatedLinearAttention,
    "kda": KimiDeltaAttention,
    "gsa": GatedSlotAttention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "linear_attention": LinearAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "retention": Retention,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "sliding_window_attention": SlidingWindowAttention,
}

__all__ = ["MIXERS", "Mixer"]
