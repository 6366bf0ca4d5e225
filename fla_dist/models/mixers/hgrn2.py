"""HGRN2 (arXiv:2404.07904, section 3.2): HGRN with its state expanded by outer products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fla_dist.kernels.hgrn2 import hgrn2
from fla_dist.models.layers import Normed, NormedLinear, RMSNorm
from fla_dist.models.mixers.base import Mixer
from fla_dist.models.mixers.hgrn import BoundedForgetGate
from fla_dist.models.stream import Stream

CHUNK = 64
"""Tokens a chunk of the chunked form; the intra-chunk FLOPs grow with it."""


@dataclass(frozen=True)
class HGRN2Config:
    """A channel's state is `expansion` numbers; so many channels make a head, whose state is
    square."""

    expansion: int = 128


class HGRN2(Mixer):
    config_class = HGRN2Config

    def __init__(self, hidden_size: int, config: HGRN2Config, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps)
        self.head_size = config.expansion
        self.input = NormedLinear(hidden_size, 3 * hidden_size)
        self.forget_gate = BoundedForgetGate(hidden_size)
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, normed: Normed, stream: Stream) -> Tensor:
        q, forget, v = self.input(normed).chunk(3, dim=-1)
        q, v, g = (
            rearrange(y, "b t (h k) -> b t h k", k=self.head_size)
            for y in (F.silu(q), v, self.forget_gate(forget))
        )
        o, state = hgrn2(
            q, v, g,
            initial_state=stream.initial_state("state"), doc_ids=stream.doc_ids, scan=stream.scan,
        )  # fmt: skip
        stream.keep_state("state", state)
        return self.output(self.norm(rearrange(o, "b t h v -> b t (h v)")))

    def flops_per_token(self, sequence_length: int) -> float:
        # Between chunks k v and q S a head, inside one the causal half of C x C scores and their
        # use.
        return self.output.in_features * (4 * self.head_size + 2 * CHUNK)

    @staticmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        if config.expansion < 1 or hidden_size % config.expansion:
            return f"expansion: {config.expansion}, expected a divisor of the width {hidden_size}"
        return None

    def initialize(self) -> None:
        self.forget_gate.initialize(self.layer_index, self.num_layers)
