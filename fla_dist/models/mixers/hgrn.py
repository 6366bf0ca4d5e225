"""HGRN (arXiv:2311.04823): an elementwise recurrence whose forget gates are bounded from below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla_dist.kernels.hgrn import hgrn
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm, keep_fp32
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.stream import Stream


class BoundedForgetGate(nn.Module):
    """Forget gates between a lower bound γ of each channel and 1, as log decays.

        f = γ + (1 - γ) σ(x)        γ = σ(logit)

    The bounds rise with depth, so that upper layers keep more. The paper ties those of all layers
    by a cumulative softmax over them; here each layer learns its own, from where that softmax
    starts, so that layers share no parameter.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit = keep_fp32(nn.Parameter(torch.empty(width)))

    def forward(self, x: Tensor) -> Tensor:
        bound, free = F.logsigmoid(self.logit), F.logsigmoid(-self.logit)
        gate = F.logsigmoid(x.to(self.logit.dtype))
        return torch.logaddexp(bound, free + gate).clamp(max=0)

    def initialize(self, layer_index: int, num_layers: int) -> None:
        bound = torch.tensor((layer_index + 0.5) / num_layers)
        nn.init.constant_(self.logit, bound.logit().item())


@dataclass(frozen=True)
class HGRNConfig:
    """Channels: expand · hidden_size."""

    expand: int = 1


class HGRN(Mixer):
    """The recurrence with real gates (without the paper's rotation of complex states)."""

    config_class = HGRNConfig

    def __init__(self, hidden_size: int, config: HGRNConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.channels = config.expand * hidden_size
        self.input = NormedLinear(hidden_size, 3 * self.channels)
        self.forget_gate = BoundedForgetGate(self.channels)
        self.norm = RMSNorm(self.channels, norm_eps)
        self.output = nn.Linear(self.channels, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        x, forget, output_gate = self.input(normed).chunk(3, dim=-1)
        o, state = hgrn(
            F.silu(x), self.forget_gate(forget),
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(self.norm(o) * F.silu(output_gate))

    def flops_per_token(self, sequence_length: int) -> float:
        # A channel: its decay's exp, 1 less it, two products and a sum.
        return 5 * self.channels

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.expand < 1:
            return f"expand: {config.expand}, expected at least 1"
        return None

    def initialize(self) -> None:
        self.forget_gate.initialize(self.layer_index, self.num_layers)
