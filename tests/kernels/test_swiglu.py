from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.swiglu import swiglu_linear
from fla_dist.kernels.swiglu.op import triton_swiglu_linear
from tests.kernels.interpreter import interpreted, run_interpreted


def plain(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 24), (3, 1024), (4, 1500)])
def test_kernels_equal_autograd(rows: int, width: int) -> None:
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(rows, 2 * width)).requires_grad_()
    weight = torch.randn(7, width, requires_grad=True)
    dy = torch.randn(rows, 7)
    outcomes = []
    for function, wide in ((triton_swiglu_linear, torch.float32), (plain, torch.float64)):
        inputs = [x.detach().to(wide).requires_grad_() for x in (gate_up, weight)]
        y = function(*inputs)
        outcomes.append([y, *torch.autograd.grad(y, inputs, dy.to(wide))])
    for got, expected in zip(*outcomes, strict=True):
        assert (got.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_gpu_equals_fp64(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    gate_up, dy = (torch.randn(2, 333, n, device="cuda", dtype=dtype) for n in (3000, 256))
    weight = torch.randn(256, 1500, device="cuda", dtype=dtype)
    outcomes = []
    for function, wide in ((triton_swiglu_linear, dtype), (plain, torch.float64)):
        inputs = [x.detach().to(wide).requires_grad_() for x in (gate_up, weight)]
        y = function(*inputs)
        outcomes.append([y, *torch.autograd.grad(y, inputs, dy.to(wide))])
    for got, expected in zip(*outcomes, strict=True):
        assert (got.double() - expected).norm() <= bound * expected.norm()


def test_weight_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(7, 5\), expected \(7, 4\)"):
        swiglu_linear(torch.zeros(3, 8), torch.zeros(7, 5))
