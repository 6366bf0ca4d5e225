"""The selective scan's Triton kernels against the recurrence in fp64: in Triton's interpreter where
there is no GPU, in every dtype where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.mamba.op import segmented_selective_scan
from fla_dist.kernels.mamba.reference import selective_scan_recurrent
from fla_dist.kernels.state import LOCAL
from tests.kernels.interpreter import interpreted, run_interpreted
from tests.packing import doc_ids_of, positions_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("y", "final", "dx", "ddt", "dA", "dB", "dC", "dinitial")


def make(batch: int, length: int, channels: int, size: int, decay: float) -> list[Tensor]:
    """x, dt, A, B, C, initial_state."""
    generator = torch.Generator().manual_seed(length + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = decay * torch.rand(batch, length, channels, generator=generator)
    A = -torch.rand(channels, size, generator=generator) - 0.1
    x, B, C = (normal(batch, length, width) for width in (channels, size, size))
    return [x, dt, A, B, C, normal(batch, channels, size)]


def doc_ids(length: int) -> Tensor:
    """Two sequences: one starts with a document, the other goes on with initial_state's."""
    starts = sorted({0, length // 3, length // 2, length - 1})
    positions = torch.stack([positions_of(starts, length)] * 2)
    positions[1, : starts[1] if len(starts) > 1 else 1] += 5
    return doc_ids_of(positions)


def results(function, inputs: list[Tensor], ids: Tensor | None, state: bool) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    *tensors, initial = inputs
    outputs = function(*tensors, initial_state=initial if state else None, doc_ids=ids)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    wanted = inputs if state else tensors
    return [*outputs, *torch.autograd.grad(outputs, wanted, weights)]


def errors(
    function, inputs: list[Tensor], ids: Tensor | None, state: bool = True
) -> dict[str, float]:
    """Relative errors in the norm; NaN where something is not finite."""
    got = results(function, inputs, ids, state)
    exact = results(selective_scan_recurrent, [x.double() for x in inputs], ids, state)
    return {
        name: ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item()
        for name, x, y in zip(NAMES, got, exact, strict=False)
    }


class OneStretch:
    """A scan other than LOCAL: what a scan over ranks gets to see."""

    def start(self, transition, state, initial, *, reverse_of=None):
        assert state.shape[1] == 1
        return LOCAL.start(transition, state, initial, reverse_of=reverse_of)


def over_ranks(*tensors, **keywords):
    return segmented_selective_scan(*tensors, scan=OneStretch(), **keywords)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(
    ("length", "channels", "size", "decay", "packed", "state"),
    [
        (1, 5, 3, 0.5, False, True),
        (15, 5, 3, 30.0, True, True),
        (33, 3, 4, 0.5, True, False),
        (100, 3, 5, 0.2, True, True),
        (16, 16, 4, 0.0, False, False),
        (9, 5, 33, 0.5, False, True),
    ],
)
def test_kernels(
    length: int, channels: int, size: int, decay: float, packed: bool, state: bool, monkeypatch
) -> None:
    import tests.kernels.interpreter  # noqa: F401
    from fla_dist.kernels.mamba import triton_forward

    monkeypatch.setattr(triton_forward, "SEGMENT", 32)
    ids = doc_ids(length) if packed else None
    function = over_ranks if length == 33 else segmented_selective_scan
    found = errors(function, make(2, length, channels, size, decay), ids, state)
    assert all(error < 1e-5 for error in found.values()), found


TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("length", "channels", "size", "decay", "packed"),
    [
        (1, 64, 16, 0.5, False),
        (15, 40, 16, 0.5, True),
        (64, 64, 16, 30.0, True),
        (100, 33, 5, 0.2, True),
        (128, 64, 64, 0.1, False),
        (4096 + 37, 64, 16, 0.05, True),
        (1024, 96, 16, 0.0, False),
    ],
)
def test_on_the_gpu(dtype, length, channels, size, decay, packed) -> None:
    x, dt, A, B, C, initial = (y.cuda() for y in make(2, length, channels, size, decay))
    x, dt, B, C = (y.to(dtype) for y in (x, dt, B, C))
    ids = doc_ids(length).cuda() if packed else None
    found = errors(segmented_selective_scan, [x, dt, A, B, C, initial], ids)
    assert all(error < TOLERANCE[dtype] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
def test_fp32_time_steps_beside_bf16() -> None:
    """What the mixer gives under autocast."""
    x, dt, A, B, C, initial = (y.cuda() for y in make(2, 1100, 96, 16, 0.1))
    inputs = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), initial]
    found = errors(segmented_selective_scan, inputs, doc_ids(1100).cuda())
    assert all(error < TOLERANCE[torch.bfloat16] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
def test_twice_the_same_bits() -> None:
    x, dt, A, B, C, initial = (y.cuda() for y in make(2, 700, 96, 16, 0.1))
    inputs = [*(y.bfloat16() for y in (x, dt)), A, B.bfloat16(), C.bfloat16(), initial]
    first, second = (results(segmented_selective_scan, inputs, None, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
