"""What blocks and mixers are made of: norms, the feed-forward layer, the short convolution, the
mark of what stays fp32."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


class _Normalize(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) of [R, D] in `dtype`. The backward needs the result alone, not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = (wide * scale).to(dtype)
        ctx.save_for_backward(y, scale)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, scale = ctx.saved_tensors
        y, dy = y.to(scale.dtype), dy.to(scale.dtype)
        return ((dy - y * (dy * y).mean(-1, keepdim=True)) * scale).to(ctx.dtype), None, None


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


class Normed(NamedTuple):
    """norm(x) of x [B, T, D], not worked out yet: what mixers and the feed-forward layer take."""

    x: Tensor
    norm: RMSNorm

    def whole(self) -> Tensor:
        """norm(x), [B, T, D]."""
        return self.norm(self.x)

    def project(self, *weights: Tensor) -> list[Tensor]:
        """norm(x) Wᵀ of each W [E, D], [B, T, E].

        The gain is multiplied into W, whose gradient then holds the gain's: a sum over E rows, not
        over all tokens. For the backward torch.compile keeps x normalized in the dtype of the
        product, and nothing of x, since a product takes it as it is: of two axes, already cast.
        """
        kind = self.x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # meta: the dry run
        dtype = torch.get_autocast_dtype(kind) if autocast else self.x.dtype
        rows = _Normalize.apply(self.x.flatten(0, 1), self.norm.eps, dtype)
        gain, shape = self.norm.weight, self.x.shape[:2]
        return [F.linear(rows, weight * gain).unflatten(0, shape) for weight in weights]


class NormedLinear(nn.Linear):
    """norm(x) Wᵀ, without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, normed: Normed) -> Tensor:  # type: ignore[override]
        return normed.project(self.weight)[0]


class SwiGLU(nn.Module):
    """(silu(x W_gate) ⊙ x W_up) W_down (arXiv:2002.05202) of normed x."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = NormedLinear(hidden_size, 2 * intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, normed: Normed) -> Tensor:
        return swiglu_linear(self.gate_up(normed), self.output.weight)


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
