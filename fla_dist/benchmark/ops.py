"""The ops as benchmarks call them: their inputs, and their errors against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.delta_rule import delta_rule
from fla_dist.kernels.delta_rule.reference import delta_rule_chunked
from fla_dist.kernels.gated_delta_rule import gated_delta_rule
from fla_dist.kernels.gated_delta_rule.reference import gated_delta_rule_chunked
from fla_dist.kernels.gla import gla
from fla_dist.kernels.gla.reference import gla_chunked
from fla_dist.kernels.gsa import gsa
from fla_dist.kernels.gsa.reference import gsa_chunked
from fla_dist.kernels.hgrn import hgrn
from fla_dist.kernels.hgrn.reference import hgrn_chunked
from fla_dist.kernels.hgrn2 import hgrn2
from fla_dist.kernels.kda import kda
from fla_dist.kernels.kda.reference import kda_chunked
from fla_dist.kernels.mamba import selective_scan
from fla_dist.kernels.mamba.reference import selective_scan_chunked
from fla_dist.kernels.mamba2 import state_space_dual
from fla_dist.kernels.retention import linear_attention, retention, retention_decay
from fla_dist.kernels.rwkv6 import rwkv6
from fla_dist.kernels.rwkv7 import rwkv7
from fla_dist.kernels.rwkv7.reference import rwkv7_chunked
from fla_dist.kernels.simple_gla import simple_gla
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked

LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Of ‖x - reference‖ / ‖reference‖, the reference in fp64."""


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    K: int
    V: int


SHAPES = (
    Shape(1, 32768, 16, 128, 128),
    Shape(8, 4096, 16, 128, 128),
    Shape(4, 8192, 8, 256, 256),
    Shape(1, 131072, 16, 128, 128),
    Shape(1, 32768, 4, 256, 512),
)


@dataclass(frozen=True)
class Op:
    """decay: makes the decay argument, or None where there is none.  peer: (module, name) in
    flash-linear-attention.  inputs: makes all arguments, by name, where they are not q, k, v and
    the decay.  products: FLOPs of the forward's matrix products a token and head, 4KV unless
    given.  checked_at: where heads or channels share arguments, the shape at which the whole op's
    errors are computed."""

    call: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    decay: Callable[[Shape, torch.dtype], Tensor] | None
    decay_has_gradient: bool
    peer: tuple[str, str] | None
    inputs: Callable[[Shape, torch.dtype], dict[str, Tensor]] | None = None
    products: Callable[[Shape], float] | None = None
    checked_at: Shape | None = None


SLOTS = 64
MAMBA2_HEAD = 64


def _log_sigmoid(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, device="cuda")) / 16


def _normal(shape: Shape, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape.B, shape.T, shape.H, width, device="cuda", dtype=dtype)


def _hgrn_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """D = H·K channels."""
    g = _log_sigmoid(s.B, s.T, s.H * s.K).to(dtype)
    return {"x": torch.randn_like(g), "g": g}


def _hgrn2_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    g = _log_sigmoid(s.B, s.T, s.H, s.K).to(dtype)
    return {"q": _normal(s, s.K, dtype), "v": _normal(s, s.V, dtype), "g": g}


def _rwkv6_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    r, k, v = (_normal(s, width, dtype) for width in (s.K, s.K, s.V))
    g, u = _log_sigmoid(s.B, s.T, s.H, s.K).to(dtype), torch.randn(s.H, s.K, device="cuda")
    return {"r": r, "k": k, "v": v, "g": g, "u": u}


def _gsa_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v = (_normal(s, width, dtype) for width in (s.K, s.K, s.V))
    return {"q": q, "k": k, "v": v, "g": _log_sigmoid(s.B, s.T, s.H, SLOTS).to(dtype)}


def _delta_rule_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v = (_normal(s, width, dtype) for width in (s.K, s.K, s.V))
    beta = torch.rand(s.B, s.T, s.H, device="cuda")
    return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta}


def _gated_delta_rule_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = _delta_rule_inputs(s, dtype)
    beta = inputs.pop("beta")
    return {**inputs, "g": _log_sigmoid(s.B, s.T, s.H), "beta": beta}


def _kda_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    return {**_gated_delta_rule_inputs(s, dtype), "g": _log_sigmoid(s.B, s.T, s.H, s.K).to(dtype)}


def _rwkv7_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Decays down to exp(-exp(-1/2)), and learning rates from 0 to 1."""
    r, k, v, removed = (_normal(s, width, dtype) for width in (s.K, s.K, s.V, s.K))
    removed = F.normalize(removed, dim=-1)
    g = -math.exp(-0.5) * torch.randn(s.B, s.T, s.H, s.K, device="cuda").sigmoid()
    b = removed * torch.rand_like(removed)
    return {"r": r, "g": g.to(dtype), "k": k, "v": v, "a": -removed, "b": b}


def _mamba_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """D = 2·H·K channels, 16 state numbers each."""
    channels = 2 * s.H * s.K
    x, dt, z = (torch.randn(s.B, s.T, channels, device="cuda", dtype=dtype) for _ in range(3))
    B, C = (torch.randn(s.B, s.T, 16, device="cuda", dtype=dtype) for _ in range(2))
    A = -torch.arange(1, 17, device="cuda").float().expand(channels, -1).contiguous()
    bias, D = torch.full((channels,), -4.0, device="cuda"), torch.randn(channels, device="cuda")
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "dt_bias": bias, "D": D, "z": z}


def _mamba(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor, **_: Any):
        return function(x, dt, A, B, C, **dict(zip(("dt_bias", "D", "z"), others, strict=False)))

    return call


def _mamba2_heads(s: Shape) -> int:
    return 2 * s.H * s.V // MAMBA2_HEAD


def _mamba2_inputs(s: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """2·H·V channels in heads of MAMBA2_HEAD, N = K state numbers, one group."""
    heads = _mamba2_heads(s)
    x = torch.randn(s.B, s.T, heads, MAMBA2_HEAD, device="cuda", dtype=dtype)
    dt = torch.randn(s.B, s.T, heads, device="cuda", dtype=dtype)
    B, C = (torch.randn(s.B, s.T, 1, s.K, device="cuda", dtype=dtype) for _ in range(2))
    A = -1 - 15 * torch.rand(heads, device="cuda")
    bias, D = torch.full((heads,), -4.0, device="cuda"), torch.randn(heads, device="cuda")
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "dt_bias": bias, "D": D}


OPS = {
    "linear_attention": Op(
        linear_attention, lambda q, k, v, **o: simple_gla_chunked(q, k, v, None, **o), None, False,
        None
    ),
    "retention": Op(
        retention, simple_gla_chunked, lambda s, dtype: retention_decay(s.H, "cuda"), False,
        ("fla.ops.retention", "chunk_retention"),
    ),
    "simple_gla": Op(
        simple_gla, simple_gla_chunked, lambda s, dtype: _log_sigmoid(s.B, s.T, s.H), True,
        ("fla.ops.simple_gla", "chunk_simple_gla"),
    ),
    "gla": Op(
        gla, gla_chunked, lambda s, dtype: _log_sigmoid(s.B, s.T, s.H, s.K).to(dtype), True,
        ("fla.ops.gla", "chunk_gla"),
    ),
    "hgrn": Op(
        hgrn, lambda x, g, scale: hgrn_chunked(x, g), None, True,
        ("fla.ops.hgrn", "chunk_hgrn"), _hgrn_inputs, lambda s: 0.0,
    ),
    "hgrn2": Op(
        hgrn2, lambda q, v, g, scale: gla_chunked(q, -g.expm1(), v, g, scale=scale), None, True,
        None, _hgrn2_inputs,
    ),
    "rwkv6": Op(
        rwkv6, lambda r, k, v, g, u, scale: rwkv6(r, k, v, g, u), None, True,
        ("fla.ops.rwkv6", "chunk_rwkv6"), _rwkv6_inputs,
    ),
    "gsa": Op(
        gsa, gsa_chunked, None, True, None, _gsa_inputs, lambda s: 4 * SLOTS * (s.K + s.V),
    ),
    "delta_rule": Op(
        delta_rule, delta_rule_chunked, None, True, ("fla.ops.delta_rule", "chunk_delta_rule"),
        _delta_rule_inputs, lambda s: 6 * s.K * s.V,
    ),
    "gated_delta_rule": Op(
        gated_delta_rule, gated_delta_rule_chunked, None, True,
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        _gated_delta_rule_inputs, lambda s: 6 * s.K * s.V,
    ),
    "kda": Op(
        kda, kda_chunked, None, True, ("fla.ops.kda", "chunk_kda"), _kda_inputs,
        lambda s: 6 * s.K * s.V,
    ),
    "rwkv7": Op(
        rwkv7, lambda *x, scale: rwkv7_chunked(*x, scale=1.0), None, True,
        ("fla.ops.rwkv7", "chunk_rwkv7"), _rwkv7_inputs, lambda s: 8 * s.K * s.V,
    ),
    "mamba": Op(
        _mamba(selective_scan), _mamba(selective_scan_chunked), None, True, None, _mamba_inputs,
        lambda s: 0.0, Shape(1, 1024, 1, 64, 64),
    ),
    "mamba2": Op(
        _mamba(state_space_dual), _mamba(state_space_dual), None, True, None, _mamba2_inputs,
        lambda s: _mamba2_heads(s) / s.H * 4 * s.K * MAMBA2_HEAD, Shape(1, 1024, 2, 128, 128),
    ),
}  # fmt: skip


def make_inputs(op: Op, shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The op's arguments, and the gradient of its output."""
    torch.manual_seed(0)
    if op.inputs is not None:
        inputs = [x.requires_grad_() for x in op.inputs(shape, dtype).values()]
        with torch.no_grad():
            return inputs, torch.randn_like(op.call(*inputs)[0])
    widths = (shape.K, shape.K, shape.V)
    inputs = [torch.randn(shape.B, shape.T, shape.H, w, device="cuda", dtype=dtype) for w in widths]
    output_gradient = torch.randn_like(inputs[2])
    for x in inputs:
        x.requires_grad_()
    if op.decay is not None:
        inputs.append(op.decay(shape, dtype).requires_grad_(op.decay_has_gradient))
    return inputs, output_gradient


def run(call: Callable[..., Any], inputs: list[Tensor], output_gradient: Tensor) -> list[Tensor]:
    """The output and the gradient of every input that has one."""
    output = call(*inputs)[0]
    wanted = [x for x in inputs if x.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, output_gradient)]


def errors(op: Op, shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Of the output and every gradient, on the first and the last head of the first sequence (all
    are alike and apart), or on everything at `checked_at`."""
    shape = op.checked_at or shape
    inputs, output_gradient = make_inputs(op, shape, dtype)
    if op.checked_at is None:
        output_gradient[1:] = 0  # other sequences add to the gradients of what all share
    results = run(op.call, inputs, output_gradient)
    names = ["q", "k", "v", "g"] if op.inputs is None else [*op.inputs(Shape(1, 1, 1, 1, 1), dtype)]
    heads = [0, shape.H - 1]

    def cut(x: Tensor) -> Tensor:
        if op.checked_at is not None:
            return x.detach()
        return x.detach()[heads] if x.ndim <= 2 else x.detach()[:1, :, heads]

    alone = [cut(x).double().requires_grad_(x.requires_grad) for x in inputs]
    reference = run(
        lambda *x: op.reference(*x, scale=shape.K**-0.5), alone, cut(output_gradient).double()
    )
    found = {}
    for name, result, truth in zip(
        ["o", *(f"d{name}" for name in names)], results, reference, strict=False
    ):
        error = (cut(result).double() - truth).norm() / truth.norm()
        found[name] = float("inf") if error.isnan() else error.item()
    return found
