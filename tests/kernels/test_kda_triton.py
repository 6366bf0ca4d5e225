"""KDA's kernels in Triton's interpreter, fp32, against the fp64 reference."""

from dataclasses import replace

import pytest
import torch

from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.kda import steps
from fla_dist.kernels.kda.op import segmented_kda
from fla_dist.kernels.kda.reference import kda_chunked
from fla_dist.kernels.kda.settings import Settings
from tests.kernels.gradient_check import errors, make_case, run
from tests.kernels.interpreter import interpreted, run_interpreted
from tests.kernels.test_delta_triton import DeltaCase, make_delta_case


def make_kda_case(shape, decay, kind, *, packed, dtype, device) -> DeltaCase:
    """A case of the gated delta rule with a gate a channel."""
    options = {"packed": packed, "dtype": dtype, "device": device}
    gates = make_case(shape, decay, vector=True, **options).g
    return replace(make_delta_case(shape, decay, kind, **options), g=gates)


def triton_op(case: DeltaCase):
    return segmented_kda(
        case.q, case.k, case.v, case.g, case.beta, scale=0.3,
        initial_state=case.initial_state, doc_ids=case.doc_ids,
    )  # fmt: skip


def reference_op(case: DeltaCase):
    return kda_chunked(
        case.q, case.k, case.v, case.g, case.beta, scale=0.3,
        initial_state=case.initial_state, doc_ids=case.doc_ids,
    )  # fmt: skip


def found_errors(shape, decay, kind, *, packed):
    case = make_kda_case(shape, decay, kind, packed=packed, dtype=torch.float32, device="cpu")
    reference = run(reference_op, case, torch.float64)
    return errors(run(triton_op, case), reference)


def choose(monkeypatch, chunk: int, *, programs: int):
    launch = Launch(16, 4, 1)
    monkeypatch.setattr(
        steps, "settings", lambda *_: Settings(chunk, *(launch,) * 8, programs=programs)
    )


@interpreted
@pytest.mark.parametrize(("decay", "packed"), [("normal", False), ("mixed", True)])
def test_interpreter_matches_reference(decay, packed, monkeypatch):
    """Two segments, the first of two chunks; the second is a part of a chunk."""
    choose(monkeypatch, 16, programs=2)
    found = found_errors((1, 40, 1, 16, 24), decay, "hard", packed=packed)
    assert max(found.values()) < 1e-5, found


@interpreted
def test_larger_chunks_and_blocks_of_keys(monkeypatch):
    choose(monkeypatch, 32, programs=10**9)
    found = found_errors((1, 40, 1, 24, 16), "strong", "parallel", packed=True)
    assert max(found.values()) < 1e-5, found


@interpreted
def test_one_segment_of_several_heads(monkeypatch):
    choose(monkeypatch, 16, programs=1)
    found = found_errors((1, 17, 2, 16, 16), "normal", "hard", packed=True)
    assert max(found.values()) < 1e-5, found


def test_in_the_interpreter():
    run_interpreted(__file__)
