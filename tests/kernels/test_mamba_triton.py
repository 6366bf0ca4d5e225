"""The selective scan's Triton kernels against the recurrence in fp64: in Triton's interpreter where
there is no GPU, in every dtype where there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.mamba.op import segmented_selective_scan
from fla_dist.kernels.mamba.reference import selective_scan_recurrent
from fla_dist.kernels.state import LOCAL
from tests.kernels.interpreter import interpreted, run_interpreted
from tests.packing import doc_ids_of, positions_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GATE = ("dt_bias", "D", "z")
OPTIONAL = (*GATE, "initial_state", "dt_weight", "weight")


def make(
    batch: int, length: int, channels: int, size: int, decay: float, gate: bool = True
) -> dict[str, Tensor]:
    """The scan's tensors by name; with a bias, Δ is about `decay`, at most twice that without."""
    generator = torch.Generator().manual_seed(length + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    x, z = normal(batch, length, channels), normal(batch, length, channels)
    B, C = normal(batch, length, size), normal(batch, length, size)
    tensors = {
        "x": x,
        "dt": decay * uniform(batch, length, channels),
        "A": -uniform(channels, size),
    }
    tensors |= {"B": B, "C": C}
    if gate:
        tensors["dt"] = normal(batch, length, channels)
        tensors["dt_bias"] = torch.full((channels,), decay).expm1().log().clamp(-14, decay)
        tensors |= {"D": normal(channels), "z": z}
    return tensors | {"initial_state": normal(batch, channels, size)}


def doc_ids(length: int) -> Tensor:
    """Two sequences: one starts with a document, the other goes on with initial_state's."""
    starts = sorted({0, length // 3, length // 2, length - 1})
    positions = torch.stack([positions_of(starts, length)] * 2)
    positions[1, : starts[1] if len(starts) > 1 else 1] += 5
    return doc_ids_of(positions)


def results(function, inputs: dict[str, Tensor], ids: Tensor | None) -> dict[str, Tensor]:
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    (*tensors,) = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    others = {name: x for name, x in inputs.items() if name in OPTIONAL}
    outputs = function(*tensors, **others, doc_ids=ids)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"y": outputs[0], "final": outputs[1], **named}


def errors(function, inputs: dict[str, Tensor], ids: Tensor | None) -> dict[str, float]:
    """Relative errors in the norm; infinite where something is not a number."""
    got = results(function, inputs, ids)
    exact = results(selective_scan_recurrent, {k: x.double() for k, x in inputs.items()}, ids)
    found = {}
    for name, x in got.items():
        error = (x.double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)
        found[name] = float("inf") if error.isnan() else error.item()
    return found


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
    ("length", "channels", "size", "decay", "packed", "gate"),
    [
        (1, 5, 3, 0.5, False, True),
        (15, 5, 3, 30.0, True, True),
        (33, 3, 4, 0.5, True, False),
        (100, 3, 5, 0.2, True, True),
        (16, 16, 4, 0.0, False, False),
        (48, 16, 4, 0.1, True, True),
        (9, 5, 33, 0.5, False, True),
    ],
)
def test_kernels(
    length: int, channels: int, size: int, decay: float, packed: bool, gate: bool, monkeypatch
) -> None:
    import tests.kernels.interpreter  # noqa: F401
    from fla_dist.kernels.mamba import triton_forward

    monkeypatch.setattr(triton_forward, "SEGMENT", 32)
    ids = doc_ids(length) if packed else None
    function = over_ranks if length in (33, 100) else segmented_selective_scan
    inputs = make(2, length, channels, size, decay, gate)
    if length == 33:
        del inputs["initial_state"]
    found = errors(function, inputs, ids)
    assert all(error < 1e-5 for error in found.values()), found


def projected(function, x, dt, A, B, C, *, dt_weight, weight, **others):
    """A scan between the projections of its layer."""
    y, state = function(x, F.linear(dt, dt_weight), A, B, C, **others)
    return F.linear(y, weight), state


def projected_errors(
    scan: Callable[..., Any], inputs: dict[str, Tensor], ids: Tensor, wide: bool
) -> dict[str, float]:
    """The differences from `scan` between two `F.linear`, in fp64 where wide; with time steps of
    rank 3 and an output of width 7."""
    x, channels = inputs["x"], inputs["x"].shape[2]
    inputs["dt"] = inputs["dt"][..., :3]
    generator = torch.Generator().manual_seed(2)
    for name, shape in (("dt_weight", (channels, 3)), ("weight", (7, channels))):
        inputs[name] = torch.randn(shape, generator=generator).to(x)
    got = results(segmented_selective_scan, inputs, ids)
    inputs = {name: x.double() if wide else x for name, x in inputs.items()}
    exact = {n: x.double() for n, x in results(partial(projected, scan), inputs, ids).items()}
    return {n: ((x.double() - exact[n]).norm() / exact[n].norm()).item() for n, x in got.items()}


@interpreted
def test_between_projections(monkeypatch) -> None:
    from fla_dist.kernels.mamba import triton_forward

    monkeypatch.setattr(triton_forward, "SEGMENT", 16)
    found = projected_errors(
        selective_scan_recurrent, make(2, 20, 5, 3, 0.2), doc_ids(20), wide=True
    )
    assert all(error < 1e-5 for error in found.values()), found


TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SEQUENCES = ("x", "dt", "B", "C", "z")


def on_the_gpu(inputs: dict[str, Tensor], dtype: torch.dtype, *kept: str) -> dict[str, Tensor]:
    """What has a time axis in `dtype`, but for `kept`."""
    halved = [name for name in SEQUENCES if name not in kept]
    return {k: x.cuda().to(dtype if k in halved else x.dtype) for k, x in inputs.items()}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", [False, True])
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
def test_on_the_gpu(dtype, gate, length, channels, size, decay, packed) -> None:
    inputs = on_the_gpu(make(2, length, channels, size, decay, gate), dtype)
    ids = doc_ids(length).cuda() if packed else None
    found = errors(segmented_selective_scan, inputs, ids)
    assert all(error < TOLERANCE[dtype] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
def test_fp32_time_steps_beside_bf16() -> None:
    """What a mixer without a bias may give under autocast."""
    inputs = on_the_gpu(make(2, 1100, 96, 16, 0.1, False), torch.bfloat16, "dt")
    found = errors(segmented_selective_scan, inputs, doc_ids(1100).cuda())
    assert all(error < TOLERANCE[torch.bfloat16] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("length", [700, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_between_projections_on_the_gpu(dtype, length) -> None:
    """What lies between the scan and the projections is rounded to dtype: so it is beside it."""
    inputs, ids = on_the_gpu(make(2, length, 96, 16, 0.1), dtype), doc_ids(length).cuda()
    found = projected_errors(segmented_selective_scan, inputs, ids, wide=False)
    assert all(error < TOLERANCE[dtype] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
def test_strided_inputs() -> None:
    """As a mixer has them: x and z halves of one projection, B and C columns of another."""
    inputs = on_the_gpu(make(2, 300, 64, 16, 0.1), torch.bfloat16)

    def strided(x, dt, A, B, C, *, z, **others):
        x, z = torch.cat([x, z], dim=-1).chunk(2, dim=-1)
        _, B, C = torch.cat([B, B, C], dim=-1).chunk(3, dim=-1)
        return segmented_selective_scan(x, dt, A, B, C, z=z, **others)

    found = errors(strided, inputs, doc_ids(300).cuda())
    assert all(error < TOLERANCE[torch.bfloat16] for error in found.values()), found


@pytest.mark.gpu
@on_gpu
def test_twice_the_same_bits() -> None:
    inputs = on_the_gpu(make(2, 700, 96, 16, 0.1), torch.bfloat16)
    first, second = (results(segmented_selective_scan, inputs, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
