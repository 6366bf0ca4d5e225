"""What a sequence mixer is.

A family is one file here: a frozen config dataclass and a module. Nothing else of the model knows
its name but the table in `__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from fla_dist.models.layers import Normed
from fla_dist.models.stream import Stream


class Mixer(nn.Module, ABC):
    """Mixes along time: [B, T, D], normed, to [B, T, D], causally and inside documents.

    Subclasses take `(hidden_size, config, norm_eps)`, set `output` (the projection back to the
    residual stream, which the initialization scales down) and name their config dataclass.
    """

    config_class: ClassVar[type]
    output: nn.Linear
    layer_index: int = 0
    num_layers: int = 1
    """The model's blocks before this mixer's, and all of them: set by the model, for families that
    initialize by depth."""

    @abstractmethod
    def __init__(self, hidden_size: int, config: Any, norm_eps: float) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, normed: Normed, stream: Stream) -> Tensor: ...

    def prepare(self, stream: Stream) -> None:
        """Makes what the layers share of a batch, before the first of them runs: it may wait for
        the GPU, which compiled blocks may not."""

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> float:
        """Forward FLOPs a token of mixing along time, what the weights' matrix products do
        excluded."""

    @staticmethod
    @abstractmethod
    def problem(hidden_size: int, config: Any) -> str | None:
        """What is wrong with the config at this width, as `key: what is, what is expected`; None if
        nothing."""

    def initialize(self) -> None:
        """Sets the parameters that are neither an nn.Linear's weight nor its bias; torch's default
        generator is seeded."""
