"""Norms whose gain is multiplied into the projections after them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fla_dist.models.layers import Normed, NormedLinear, RMSNorm


def make(dtype: torch.dtype) -> tuple[torch.Tensor, RMSNorm, NormedLinear]:
    torch.manual_seed(0)
    norm, linear = RMSNorm(24, 1e-2).to(dtype), NormedLinear(24, 10).to(dtype)
    x = torch.randn(2, 7, 24, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24))
        norm.weight[3] = 0  # the backward divides by no gain
        x[1, 2] = 0
    return x, norm, linear


def test_projections_of_normed_equal_autograd() -> None:
    x, norm, linear = make(torch.float64)
    parts = Normed(x, norm).project(*linear.weight.split([4, 6]))
    expected = F.linear(norm(x), linear.weight)
    torch.testing.assert_close(torch.cat(parts, dim=-1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(linear(Normed(x, norm)), expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(expected)
    inputs = (x, norm.weight, linear.weight)
    outcomes = (torch.autograd.grad(y, inputs, dy) for y in (torch.cat(parts, dim=-1), expected))
    for got, truth in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-11)


def test_in_autocast_one_rounding_is_kept_for_the_backward() -> None:
    x, norm, linear = make(torch.float32)
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = linear(Normed(x, norm))
    of_tokens = [t for t in kept if t.shape[:1] == (14,) and t.shape[1] > 1]
    assert {(t.shape, t.dtype) for t in of_tokens} == {((14, 24), torch.bfloat16)}
    assert len({t.data_ptr() for t in of_tokens}) == 1
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (truth,) = torch.autograd.grad(F.linear(norm(x), linear.weight), x, torch.ones_like(y).float())
    assert (dx - truth).norm() <= 1e-2 * truth.norm()
