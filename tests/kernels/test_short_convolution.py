from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fla_dist.kernels.short_convolution import short_convolution
from fla_dist.kernels.short_convolution.op import triton_short_convolution
from fla_dist.kernels.short_convolution.reference import short_convolution_reference
from tests.kernels.interpreter import interpreted, run_interpreted
from tests.packing import positions_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_equals_torch_convolution_on_one_document() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 9, 3), (3, 4), (3,)))
    left = torch.randn(2, 3, 3, dtype=torch.float64)
    positions = torch.arange(20, 29).expand(2, -1)
    got = short_convolution(x, weight, bias, left_context=left, positions=positions)
    channels_first = torch.cat([left, x], dim=1).transpose(1, 2)
    expected = F.conv1d(channels_first, weight[:, None], bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_documents_do_not_see_each_other(width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 12, 3), torch.randn(3, width)
    left = torch.randn(1, width - 1, 3)
    positions = positions_of([0, 5, 6], 12)[None]
    packed = short_convolution(x, weight, None, left_context=left, positions=positions)
    zeros = torch.zeros(1, width - 1, 3)
    parts = [
        short_convolution(
            x[:, a:b], weight, None, left_context=zeros, positions=torch.arange(b - a)[None]
        )
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def test_wrong_context() -> None:
    x = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match=r"left_context has shape \(1, 2, 3\), expected \(1, 3"):
        short_convolution(
            x,
            torch.zeros(3, 4),
            None,
            left_context=torch.zeros(1, 2, 3),
            positions=torch.arange(5)[None],
        )


def results(function, length: int, channels: int, width: int, options: dict) -> list[torch.Tensor]:
    """y and the gradients of x, weight, bias and the left context."""
    device, dtype = options["device"], options["dtype"]
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 2 * channels), (channels, width), (channels,), (2, width - 1, channels)]
    x, weight, bias, left = (
        torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in shapes
    )
    x, left = x.to(dtype).requires_grad_(), left.to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = weight.to(wide).requires_grad_(), bias.to(wide).requires_grad_()
    starts = sorted({0, length // 3, min(length // 3 + 1, length - 1), length - 1})
    positions = torch.stack(
        [positions_of(starts, length), torch.arange(2, 2 + length, dtype=torch.int32)]
    )
    dy = torch.randn(2, length, channels, generator=generator).to(device, torch.bfloat16)
    bias = bias if options["silu"] else None
    y = function(x[..., channels:], weight, bias, left, positions.to(device), options["silu"])
    wanted = [x, weight, *([] if bias is None else [bias]), left]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def assert_right(
    length: int, channels: int, width: int, silu: bool, device: str, dtype: torch.dtype
) -> None:
    options = {"silu": silu, "device": device, "dtype": dtype}
    got = results(triton_short_convolution, length, channels, width, options)
    expected = results(
        short_convolution_reference, length, channels, width, options | {"dtype": torch.float64}
    )
    bound = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    for x, truth in zip(got, expected, strict=True):
        assert (x.double() - truth).norm() <= bound * truth.norm()


@interpreted
@pytest.mark.parametrize(
    ("length", "channels", "width", "silu"),
    [(1, 5, 4, True), (40, 5, 4, True), (19, 16, 3, False), (16, 16, 2, True)],
)
def test_kernels(length, channels, width, silu, monkeypatch) -> None:
    from fla_dist.kernels.short_convolution import triton_kernels

    monkeypatch.setattr(triton_kernels, "SEGMENT", 16)
    monkeypatch.setattr(triton_kernels, "CHANNELS", 16)
    assert_right(length, channels, width, silu, "cpu", torch.float32)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_on_the_gpu(dtype, width, silu) -> None:
    for length, channels in ((1, 64), (15, 40), (100, 33), (4096 + 37, 300), (1024, 256)):
        assert_right(length, channels, width, silu, "cuda", dtype)


def test_wrong_activation() -> None:
    with pytest.raises(ValueError, match="activation is 'gelu', expected silu or None"):
        short_convolution(
            torch.zeros(1, 5, 3),
            torch.zeros(3, 4),
            None,
            left_context=torch.zeros(1, 3, 3),
            positions=torch.arange(5)[None],
            activation="gelu",
        )
