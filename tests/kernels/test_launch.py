"""A step is called as it is in eager mode, and is one op to whatever looks at ops."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fla_dist.kernels.common.launch import step

calls = []


@step("fla_dist_tests::twice")
def twice(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    calls.append(x)
    return 2 * x, scale * x


@twice.register_fake
def _(x, scale):
    return torch.empty_like(x), torch.empty_like(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return twice(x, 1.0)[0]

    @staticmethod
    def backward(ctx, gradient):
        return twice(gradient, 1.0)[0]


def double(x):
    return Doubled.apply(x.sin()).cos()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def gradient(function, x):
    x = x.clone().requires_grad_()
    output = function(x)
    return output.detach(), *torch.autograd.grad(output.sum(), x)


def test_eager_calls_pass_the_dispatcher():
    calls.clear()
    x = torch.randn(3)
    twice(x, 1.0)
    assert calls[0] is x


def test_a_dispatch_mode_sees_the_op():
    recorder = Recorder()
    with recorder:
        twice(torch.randn(3), 1.0)
    assert "fla_dist_tests.twice.default" in recorder.seen


def test_compiles_whole_and_agrees():
    x = torch.randn(5, dtype=torch.float64)
    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    for result, expected in zip(gradient(compiled, x), gradient(double, x), strict=True):
        torch.testing.assert_close(result, expected)
