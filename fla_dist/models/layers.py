"""What blocks and mixers are made of: norms, the feed-forward layer, the short convolution, the
mark of what stays fp32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fla_dist.kernels.short_convolution import short_convolution
from fla_dist.kernels.swiglu import swiglu_linear
from fla_dist.models.stream import Stream
from fla_dist.parallel.halo import PendingHalo

TIME_STEP_MIN, TIME_STEP_MAX = 1e-3, 0.1


def keep_fp32(parameter: nn.Parameter) -> nn.Parameter:
    """Marks a decay, time step or gain: fp32 whatever the run's precision, and no weight decay."""
    parameter._keep_fp32 = True  # type: ignore[attr-defined]
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def time_step_bias_(bias: Tensor) -> None:
    """Fills the bias of a softplus so that it gives time steps log-uniform in [1e-3, 0.1]
    (arXiv:2312.00752)."""
    log_min, log_max = math.log(TIME_STEP_MIN), math.log(TIME_STEP_MAX)
    step = torch.empty(bias.shape).uniform_(log_min, log_max).exp()
    with torch.no_grad():
        bias.copy_(step + (-(-step).expm1()).log())  # softplus⁻¹


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last axis, the sum in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def token_shift(x: Tensor, stream: Stream) -> Tensor:
    """Each token's predecessor in its document, zeros for the first: [B, T, D] to the same."""
    before = torch.cat([stream.before("token", x, 1).wait(), x[:, :-1]], dim=1)
    return before.masked_fill((stream.positions == 0)[..., None], 0)


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
        return swiglu_linear(self.gate_up(x), self.output.weight)


class ShortConvolution(nn.Module):
    """silu of a depthwise causal convolution over time, inside documents: [B, T, D] to the same.
    The backward makes it again from its input, which is kept anyway."""

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def before(self, x: Tensor, stream: Stream) -> PendingHalo:
        """What it sees before x, on its way."""
        return stream.before("convolution", x, self.weight.shape[1] - 1)

    def forward(self, x: Tensor, before: PendingHalo, stream: Stream) -> Tensor:
        return checkpoint(
            short_convolution, x, self.weight, self.bias,
            left_context=before.wait(), positions=stream.positions, activation="silu",
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip

    def initialize(self) -> None:
        """Uniform in ±1/√width, as torch's own convolutions."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
