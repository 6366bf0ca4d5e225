"""The kernels of GLA in Triton's interpreter, fp32, against the fp64 recurrences it serves."""

import pytest
import torch

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.gla import steps
from fla_dist.kernels.gla.op import SegmentedGLA
from fla_dist.kernels.gla.reference import gla_recurrent
from fla_dist.kernels.gla.settings import Settings
from fla_dist.kernels.hgrn2.reference import hgrn2_recurrent
from fla_dist.kernels.rwkv6.reference import rwkv6_recurrent
from fla_dist.kernels.state import LOCAL
from tests.kernels.gradient_check import errors, make_case, run
from tests.kernels.interpreter import interpreted, run_interpreted


@interpreted
@pytest.mark.parametrize(
    ("op", "decay", "packed", "block"),
    [
        ("gla", "normal", False, 16),
        ("gla", "strong", True, 16),
        ("gla", "mixed", True, 32),
        ("hgrn2", "mixed", False, 16),
        ("rwkv6", "mixed", True, 16),
    ],
)
def test_interpreter_matches_reference(op, decay, packed, block, monkeypatch):
    """A segment of two chunks and one of a part of a chunk; where the block holds all keys and
    values, dk and dv in one walk; where not packed, the scores' gradient beside that for dq. The
    bonus is the first token's key: its gradient is in dk."""
    chosen = Settings(*(Launch(block, 4, 1),) * 6, programs=1, longest=64)
    monkeypatch.setattr(steps, "settings", lambda *_: chosen)
    monkeypatch.setattr(steps, "WIDEST", 16 if packed else 8)
    case = make_case(
        (1, 75, 1, 24, 16), decay, packed=packed, dtype=torch.float32, device="cpu", vector=True
    )

    def triton_op(c):
        k, bonus = None if op == "hgrn2" else c.k, c.k[0, 0] if op == "rwkv6" else None
        return SegmentedGLA.apply(
            c.q, k, c.v, c.g, bonus, c.initial_state, c.doc_ids, 0.5, on_gpu(LOCAL)
        )

    def reference_op(c):
        options = {"initial_state": c.initial_state, "doc_ids": c.doc_ids}
        if op == "rwkv6":
            return rwkv6_recurrent(0.5 * c.q, c.k, c.v, c.g, c.k[0, 0], **options)
        if op == "hgrn2":
            return hgrn2_recurrent(c.q, c.v, c.g, scale=0.5, **options)
        return gla_recurrent(c.q, c.k, c.v, c.g, scale=0.5, **options)

    found = errors(run(triton_op, case), run(reference_op, case, torch.float64))
    assert max(found.values()) < 1e-5, found


def test_in_the_interpreter():
    run_interpreted(__file__)
