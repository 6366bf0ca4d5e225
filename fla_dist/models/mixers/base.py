"""What a sequence mixer is.

A family is one file here: a frozen config dataclass and a module. Nothing else of the model knows
its name but the table in `__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from fla_dist.models.stream import Stream


class Mixer(nn.Module, ABC):
    """Mixes along time: [B, T, D] to [B, T, D], causally and inside documents.

    Subclasses take `(hidden_size, config, norm_eps)`, set `output` (the projection back to the
    residual stream, which the initialization scales down) and name their config dataclass.
    """

    config_class: ClassVar[type]
    output: nn.Linear

    @abstractmethod
    def __init__(self, hidden_size: int, config: Any, norm_eps: float) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, stream: Stream) -> Tensor: ...

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
