"""The kernels of GLA in Triton's interpreter, fp32, against the fp64 reference."""

import pytest
import torch

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.gla import steps
from fla_dist.kernels.gla.op import SegmentedGLA
from fla_dist.kernels.gla.reference import gla_chunked
from fla_dist.kernels.gla.settings import Settings
from fla_dist.kernels.state import LOCAL
from tests.kernels.gradient_check import errors, make_case, run
from tests.kernels.interpreter import interpreted, run_interpreted


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", ["normal", "strong", "mixed"])
def test_interpreter_matches_reference(decay, packed, monkeypatch):
    launch = Launch(16, 4, 1)
    chosen = Settings(16, launch, launch, launch, launch, launch, programs=10**9, longest=32)
    monkeypatch.setattr(steps, "settings", lambda *_: chosen)
    case = make_case(
        (1, 41, 1, 24, 16), decay, packed=packed, dtype=torch.float32, device="cpu", vector=True
    )

    def triton_op(c):
        return SegmentedGLA.apply(
            c.q, c.k, c.v, c.g, c.initial_state, c.doc_ids, 24**-0.5, on_gpu(LOCAL)
        )

    def reference_op(c):
        return gla_chunked(
            c.q, c.k, c.v, c.g, scale=24**-0.5, initial_state=c.initial_state, doc_ids=c.doc_ids
        )

    found = errors(run(triton_op, case), run(reference_op, case, torch.float64))
    assert max(found.values()) < 1e-5, found


def test_in_the_interpreter():
    run_interpreted(__file__)
