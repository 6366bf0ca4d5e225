"""The kernels of GSA in Triton's interpreter, fp32, against the fp64 reference."""

import pytest
import torch

from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.gsa import steps
from fla_dist.kernels.gsa.settings import Settings
from tests.kernels.gpu.check_gsa import by_kernels, by_reference, make_gsa_case
from tests.kernels.gradient_check import errors, run
from tests.kernels.interpreter import interpreted, run_interpreted


@interpreted
@pytest.mark.parametrize(
    ("slots", "decay", "packed"),
    [(16, "normal", False), (12, "strong", True), (64, "mixed", True)],
)
def test_interpreter_matches_reference(slots, decay, packed, monkeypatch):
    launch = Launch(16, 4, 1)
    chosen = Settings(16, *(launch,) * 7, programs=2)  # of two chunks and of one
    monkeypatch.setattr(steps, "settings", lambda *_: chosen)
    case = make_gsa_case(
        (1, 41, 1, 24, 16), slots, decay, packed=packed, dtype=torch.float32, device="cpu"
    )
    found = errors(run(by_kernels, case), run(by_reference, case, torch.float64))
    assert max(found.values()) < 1e-5, found


def test_in_the_interpreter():
    run_interpreted(__file__)
