"""A step is called as it is in eager mode, and is one op to whatever looks at ops; a kernel is
searched for once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

from fla_dist.kernels.common import launch
from fla_dist.kernels.common.launch import Kernel, step

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


class Compiled(CompiledKernel):
    """What a launch is compiled to: notes what it is launched with."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Jit:
    arg_names = ("x", "length", "scale", "C", "D")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.compiled.append((arguments, constants))
            return Compiled(self.launched)

        return launch


def test_a_launch_like_one_before_needs_no_search():
    jit = Jit()
    kernel = Kernel(jit)
    x = torch.empty(64)
    kernel[(2,)](x, 7, 0.5, D=3, C=4)
    kernel[(5, 6)](x.clone(), 7, 0.25, D=3, C=4)
    assert len(jit.compiled) == 1
    ((grid, arguments),) = jit.launched
    assert grid == (5, 6, 1) and arguments[1:] == (7, 0.25, 4, 3)


@pytest.mark.parametrize(
    ("argument", "other"),
    [
        (torch.empty(64), torch.empty(64, dtype=torch.float16)),
        (torch.empty(64), torch.empty(64)[1:]),
        (torch.empty(64), None),
        (7, 1),
        (7, 32),
        (16, 2**32),
        (7, 7.0),
        (1, True),
    ],
)
def test_what_triton_compiles_anew_is_searched_for(argument, other):
    jit = Jit()
    kernel = Kernel(jit)
    for _ in range(2):
        for each in (argument, other):
            kernel[(2,)](each, 3, 0.5, C=4, D=3)
            kernel[(2,)](each, 3, 0.5, C=8, D=3)
    assert len(jit.compiled) == len(jit.launched) == 4


@pytest.mark.parametrize(
    ("dtype", "key_size", "value_size", "expected"),
    [
        (torch.bfloat16, 64, 256, True),
        (torch.bfloat16, 16, 136, True),
        (torch.bfloat16, 65, 256, False),
        (torch.bfloat16, 72, 256, False),
        (torch.bfloat16, 64, 264, False),
        (torch.float32, 16, 32, True),
        (torch.float32, 12, 20, False),
        (torch.float32, 20, 20, False),
        (torch.float16, 64, 256, False),
    ],
)
def test_sizes_are_checked_as_blocks_take_them(dtype, key_size, value_size, expected, monkeypatch):
    widths = {(torch.bfloat16, 64, 256), (torch.float32, 16, 32)}
    x = torch.empty(1, dtype=dtype)
    assert not launch.is_checked(x, key_size, value_size, widths)  # on no GPU
    monkeypatch.setattr(launch, "capability", lambda _: 90)
    assert launch.is_checked(x, key_size, value_size, widths) == expected
