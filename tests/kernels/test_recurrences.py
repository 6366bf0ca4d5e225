"""Every recurrent family, chunked form against recurrence, in fp64: outputs and gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.delta_rule.reference import delta_rule_chunked, delta_rule_recurrent
from fla_dist.kernels.gated_delta_rule import gated_delta_rule
from fla_dist.kernels.gated_delta_rule.reference import (
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
)
from fla_dist.kernels.gla import gla
from fla_dist.kernels.gla.reference import gla_chunked, gla_recurrent
from fla_dist.kernels.gsa.reference import gsa_chunked, gsa_recurrent
from fla_dist.kernels.hgrn.reference import hgrn_chunked, hgrn_recurrent
from fla_dist.kernels.hgrn2 import hgrn2
from fla_dist.kernels.hgrn2.reference import hgrn2_recurrent
from fla_dist.kernels.kda.reference import kda_chunked, kda_recurrent
from fla_dist.kernels.mamba import selective_scan
from fla_dist.kernels.mamba.reference import selective_scan_chunked, selective_scan_recurrent
from fla_dist.kernels.mamba2 import state_space_dual
from fla_dist.kernels.mamba2.reference import state_space_dual_recurrent
from fla_dist.kernels.rwkv6 import rwkv6
from fla_dist.kernels.rwkv6.reference import rwkv6_recurrent
from fla_dist.kernels.rwkv7.reference import rwkv7_chunked, rwkv7_recurrent
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked, simple_gla_recurrent
from fla_dist.kernels.state import LocalScan
from tests.packing import doc_ids_of, positions_of

LENGTHS = [1, 15, 16, 33, 100]
TOLERANCE = 1e-12


def gla_inputs(length: int, decay: float) -> list[Tensor]:
    q, k, v = (torch.randn(2, length, 2, size) for size in (5, 5, 7))
    return [q, k, v, -decay * torch.rand(2, length, 2, 5), torch.randn(2, 2, 5, 7)]


def delta_inputs(length: int, decay: float) -> list[Tensor]:
    """Keys of length 1, beta up to 2, and every third key nearly that of the token before."""
    q, k, v, g, state = gla_inputs(length, decay)
    k[:, 2::3] = k[:, 1 : length - 1 : 3] + 1e-3 * k[:, 2::3]
    return [q, F.normalize(k, dim=-1), v, g, 2 * torch.rand(2, length, 2), state]


def delta_rule_inputs(length: int, decay: float) -> list[Tensor]:
    q, k, v, _, beta, state = delta_inputs(length, decay)
    return [q, k, v, beta, state]


def gated_delta_rule_inputs(length: int, decay: float) -> list[Tensor]:
    q, k, v, g, beta, state = delta_inputs(length, decay)
    return [q, k, v, g[..., 0], beta, state]


def rwkv7_inputs(length: int, decay: float) -> list[Tensor]:
    r, a, v, g, beta, state = delta_inputs(length, decay)
    return [r, g, torch.randn_like(r), v, -a, a * (beta / 2)[..., None], state]


def mamba_inputs(length: int, decay: float) -> list[Tensor]:
    x, B, C = (torch.randn(2, length, size) for size in (6, 4, 4))
    A = -torch.rand(6, 4) - 0.1
    return [x, decay * torch.rand(2, length, 6), A, B, C, torch.randn(2, 6, 4)]


def gla_form(function: Callable, *inputs: Tensor, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    *tensors, state = inputs
    return function(*tensors, scale=0.3, initial_state=state, doc_ids=doc_ids)


def mamba_form(
    function: Callable, *inputs: Tensor, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    *tensors, state = inputs
    return function(*tensors, initial_state=state, doc_ids=doc_ids)


def simple_gla_inputs(length: int, decay: float) -> list[Tensor]:
    q, k, v, g, state = gla_inputs(length, decay)
    return [q, k, v, g[..., 0], state]


def retention_inputs(length: int, decay: float) -> list[Tensor]:
    q, k, v, _, state = gla_inputs(length, decay)
    return [q, k, v, -decay / 10 * torch.rand(2), state]


def hgrn_inputs(length: int, decay: float) -> list[Tensor]:
    return [
        torch.randn(2, length, 6), -decay * torch.rand(2, length, 6), torch.randn(2, 6)
    ]  # fmt: skip


def hgrn2_inputs(length: int, decay: float) -> list[Tensor]:
    q, _, v, g, state = gla_inputs(length, decay)
    return [q, v, g, state]


def rwkv6_inputs(length: int, decay: float) -> list[Tensor]:
    *tensors, state = gla_inputs(length, decay)
    return [*tensors, torch.randn(2, 5), state]


def gsa_inputs(length: int, decay: float) -> list[Tensor]:
    q, k, v, _, _ = gla_inputs(length, decay)
    return [q, k, v, -decay * torch.rand(2, length, 2, 3), torch.randn(2, 2, 3, 12)]


def gated_mamba_inputs(length: int, decay: float) -> list[Tensor]:
    *tensors, state = mamba_inputs(length, decay)
    return [*tensors, torch.randn(6), torch.randn(6), torch.randn(2, length, 6), state]


def mamba2_inputs(length: int, decay: float) -> list[Tensor]:
    """Four heads in two groups."""
    x, B, C = (torch.randn(2, length, *size) for size in ((4, 3), (2, 5), (2, 5)))
    dt, A = torch.randn(2, length, 4), -decay * torch.rand(4)
    return [x, dt, A, B, C, torch.randn(4), torch.randn(4), torch.randn(2, 4, 5, 3)]


def mamba2_form(
    function: Callable, *inputs: Tensor, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    *tensors, bias, D, state = inputs
    return function(*tensors, dt_bias=bias, D=D, initial_state=state, doc_ids=doc_ids)


def gated_mamba_form(
    function: Callable, *inputs: Tensor, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    *tensors, bias, D, z, state = inputs
    return function(*tensors, dt_bias=bias, D=D, z=z, initial_state=state, doc_ids=doc_ids)


FAMILIES = {
    "delta_rule": (delta_rule_inputs, gla_form, delta_rule_recurrent, delta_rule_chunked),
    "gated_delta_rule": (
        gated_delta_rule_inputs,
        gla_form,
        gated_delta_rule_recurrent,
        gated_delta_rule_chunked,
    ),
    "kda": (delta_inputs, gla_form, kda_recurrent, kda_chunked),
    "rwkv7": (rwkv7_inputs, gla_form, rwkv7_recurrent, rwkv7_chunked),
    "gla": (gla_inputs, gla_form, gla_recurrent, gla_chunked),
    "gsa": (gsa_inputs, gla_form, gsa_recurrent, gsa_chunked),
    "hgrn": (hgrn_inputs, mamba_form, hgrn_recurrent, hgrn_chunked),
    "hgrn2": (hgrn2_inputs, gla_form, hgrn2_recurrent, hgrn2),
    "mamba": (mamba_inputs, mamba_form, selective_scan_recurrent, selective_scan_chunked),
    "mamba with gate": (
        gated_mamba_inputs,
        gated_mamba_form,
        selective_scan_recurrent,
        selective_scan_chunked,
    ),
    "mamba2": (
        mamba2_inputs,
        mamba2_form,
        state_space_dual_recurrent,
        state_space_dual,
    ),
    "retention": (retention_inputs, gla_form, simple_gla_recurrent, simple_gla_chunked),
    "rwkv6": (rwkv6_inputs, mamba_form, rwkv6_recurrent, rwkv6),
    "simple_gla": (simple_gla_inputs, gla_form, simple_gla_recurrent, simple_gla_chunked),
}


@pytest.fixture(autouse=True)
def double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def results(form: Callable, function: Callable, inputs: list[Tensor], doc_ids: Tensor | None):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = form(function, *inputs, doc_ids=doc_ids)
    weights = [torch.linspace(-1, 2, y.numel()).view_as(y) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= tolerance * y.norm().clamp(min=1e-300)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 30.0])
def test_chunked_equals_recurrence(family: str, length: int, packed: bool, decay: float) -> None:
    make, form, recurrent, chunked = FAMILIES[family]
    inputs = make(length, decay)
    doc_ids = None
    if packed:
        starts = sorted({0, length // 3, length // 2, length - 1})
        # One sequence starts with a document, the other continues the one of initial_state.
        positions = torch.stack([positions_of(starts, length), positions_of(starts, length)])
        positions[1, : starts[1] if len(starts) > 1 else 1] += 5
        doc_ids = doc_ids_of(positions)
    assert_close(results(form, chunked, inputs, doc_ids), results(form, recurrent, inputs, doc_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_document_start_forgets_everything_before(family: str) -> None:
    make, form, _, chunked = FAMILIES[family]
    inputs = make(40, 0.3)
    doc_ids = doc_ids_of(torch.stack([positions_of([0, 19], 40)] * 2))
    reset, final = form(chunked, *inputs, doc_ids=doc_ids)
    # Only arguments with a time axis are cut.
    tail = [x[:, 19:] if x.ndim > 2 and x.shape[1] == 40 else x for x in inputs]
    tail[-1] = torch.zeros_like(tail[-1])
    alone, alone_final = form(chunked, *tail, doc_ids=None)
    assert_close([reset[:, 19:], final], [alone, alone_final])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_against_differences(family: str) -> None:
    make, form, _, chunked = FAMILIES[family]
    doc_ids = doc_ids_of(torch.stack([positions_of([0, 5], 9)] * 2))
    inputs = [x.requires_grad_() for x in make(9, 0.5)]
    assert torch.autograd.gradcheck(lambda *x: form(chunked, *x, doc_ids=doc_ids), inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_leaves_the_states_as_they_are(family: str) -> None:
    make, form, _, chunked = FAMILIES[family]
    inputs = [x.float() for x in make(40, 0.5)]
    expected = results(form, chunked, inputs, None)

    def under_autocast(*arguments, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return chunked(*arguments, **options)

    got = results(form, under_autocast, inputs, None)
    assert_close(got, expected, tolerance=1e-6)


def test_half_precision_inputs_keep_fp32_states() -> None:
    q, k, v, g, _ = (x.to(torch.bfloat16) for x in gla_inputs(20, 0.5))
    output, state = gla(q, k, v, g)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    x, dt, A, B, C, _ = (y.to(torch.bfloat16) for y in mamba_inputs(20, 0.5))
    output, state = selective_scan(x, dt, A.float(), B, C)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_split_stream_equals_whole() -> None:
    """The final state of one call is the initial state of the next: generation and streaming."""
    for family in FAMILIES:
        make, form, _, chunked = FAMILIES[family]
        inputs = make(50, 0.5)
        whole, final = form(chunked, *inputs, doc_ids=None)
        first = [x[:, :21] if x.ndim > 2 and x.shape[1] == 50 else x for x in inputs]
        second = [x[:, 21:] if x.ndim > 2 and x.shape[1] == 50 else x for x in inputs]
        head, second[-1] = form(chunked, *first, doc_ids=None)
        tail, last = form(chunked, *second, doc_ids=None)
        assert_close([torch.cat([head, tail], dim=1), last], [whole, final])


def test_gated_delta_rule_shares_keys_among_value_heads() -> None:
    q, k, _, _, _, _ = delta_inputs(20, 0.5)
    v, g, beta = torch.randn(2, 20, 6, 7), -torch.rand(2, 20, 6), torch.rand(2, 20, 6)
    got = gated_delta_rule(q, k, v, g, beta)
    q, k = (x[:, :, [0, 0, 0, 1, 1, 1]] for x in (q, k))
    expected = gated_delta_rule_recurrent(q, k, v, g, beta, scale=5**-0.5)
    assert_close(list(got), list(expected))
    with pytest.raises(ValueError, match="v has 5 heads, expected a multiple of q's 2"):
        gated_delta_rule(q[:, :, :2], k[:, :, :2], v[:, :, :5], g[:, :, :5], beta[:, :, :5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(2, 9, 2, 4)), r"k has shape \(2, 9, 2, 4\), expected \(2, 9, 2, 5\)"),
        (dict(g=torch.zeros(2, 9, 2)), r"g has shape \(2, 9, 2\), expected \(2, 9, 2, 5\)"),
        (dict(v=torch.zeros(2, 9, 7)), r"v has shape \(2, 9, 7\), expected \[B, T, H, V\]"),
        (dict(doc_ids=torch.zeros(9)), r"doc_ids has shape \(9,\), expected \(2, 9\)"),
        (dict(q=torch.zeros(2, 9, 2, 5, device="meta")), r"k is on cpu, expected meta"),
    ],
)
def test_gla_names_the_argument_that_does_not_fit(change: dict, message: str) -> None:
    q, k, v, g, _ = gla_inputs(9, 0.5)
    arguments = {"q": q, "k": k, "v": v, "g": g, "doc_ids": None, **change}
    with pytest.raises(ValueError, match=message):
        gla(**arguments)


def test_selective_scan_names_the_argument_that_does_not_fit() -> None:
    x, dt, A, B, C, _ = mamba_inputs(9, 0.5)
    with pytest.raises(ValueError, match=r"selective_scan: C has shape \(2, 9, 3\), expected"):
        selective_scan(x, dt, A, B, F.pad(C, (0, -1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_freed_with_its_outputs(family: str) -> None:
    """Also without the garbage collector, which does not see what a cycle of nodes holds."""
    make, form, _, chunked = FAMILIES[family]
    gc.disable()
    try:
        for backward in (True, False):
            scan = LocalScan()
            watched = weakref.ref(scan)
            inputs = [x.requires_grad_() for x in make(40, 0.5)]
            output, state = form(partial(chunked, scan=scan), *inputs, doc_ids=None)
            if backward:
                (output.sum() + state.sum()).backward()
            del scan, output, state
            assert watched() is None
    finally:
        gc.enable()


def test_state_space_dual_names_the_argument_that_does_not_fit() -> None:
    x, dt, A, B, C, *_ = mamba2_inputs(9, 0.5)
    with pytest.raises(ValueError, match="B has 3 groups, expected a divisor of x's 4 heads"):
        state_space_dual(x, dt, A, torch.zeros(2, 9, 3, 5), C)
    with pytest.raises(ValueError, match=r"state_space_dual: C is torch.float32, expected x's"):
        state_space_dual(x, dt, A, B, C.float())
