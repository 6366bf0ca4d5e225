"""The kernels of simple GLA and its settings in Triton's interpreter, fp32, against the fp64
reference."""

from dataclasses import replace

import pytest
import torch

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.simple_gla import steps
from fla_dist.kernels.simple_gla.op import SegmentedSimpleGLA
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked, simple_gla_recurrent
from fla_dist.kernels.simple_gla.settings import Settings
from fla_dist.kernels.state import LOCAL
from tests.kernels.gradient_check import errors, make_case, run
from tests.kernels.interpreter import interpreted, run_interpreted


def triton_op(case):
    scale = case.q.shape[-1] ** -0.5
    return SegmentedSimpleGLA.apply(
        case.q, case.k, case.v, case.g, case.initial_state, case.doc_ids, scale, on_gpu(LOCAL)
    )


def reference_op(case, op=simple_gla_chunked):
    return op(
        case.q, case.k, case.v, case.g,
        scale=case.q.shape[-1] ** -0.5, initial_state=case.initial_state, doc_ids=case.doc_ids,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    launch = Launch(16, 4, 1)
    monkeypatch.setattr(
        steps,
        "settings",
        lambda *_: Settings(16, launch, launch, launch, programs=10**9, longest=32),
    )


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", ["normal", "strong", "mixed"])
@pytest.mark.parametrize("kind", ["token", "head", "none"])
def test_interpreter_matches_reference(kind, decay, packed):
    case = make_case(
        (1, 50, 2, 16, 24), decay, packed=packed, dtype=torch.float32, device="cpu", vector=False
    )
    case = replace(case, g={"token": case.g, "head": case.g[0, 0].clone(), "none": None}[kind])
    found = errors(run(triton_op, case), run(reference_op, case, torch.float64))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("packed", [False, True])
def test_chunked_matches_recurrent(packed):
    case = make_case(
        (2, 70, 2, 5, 3), "mixed", packed=packed, dtype=torch.float64, device="cpu", vector=False
    )
    case = replace(case, g=case.g.double())
    recurrent = run(lambda c: reference_op(c, simple_gla_recurrent), case, torch.float64)
    found = errors(run(reference_op, case, torch.float64), recurrent)
    assert max(found.values()) < 1e-10, found


def test_in_the_interpreter():
    run_interpreted(__file__)
