"""What blocks and mixers are made of: the norm, the feed-forward layer, the mark of what stays
fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_fp32(parameter: nn.Parameter) -> nn.Parameter:
    """Marks a decay, time step or gain: fp32 whatever the run's precision, and no weight decay."""
    parameter._keep_fp32 = True  # type: ignore[attr-defined]
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467) over the last axis, statistics in
    fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = keep_fp32(nn.Parameter(torch.ones(size)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """(silu(x W_gate) ⊙ x W_up) W_down (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * up)
