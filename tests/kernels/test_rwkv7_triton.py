"""The kernels of RWKV7 in Triton's interpreter, fp32, against the fp64 reference."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.rwkv7 import steps
from fla_dist.kernels.rwkv7.op import segmented_rwkv7
from fla_dist.kernels.rwkv7.reference import rwkv7_chunked
from fla_dist.kernels.rwkv7.settings import Settings
from fla_dist.kernels.state import LocalScan
from tests.kernels.gradient_check import Case, errors, make_case, run
from tests.kernels.interpreter import interpreted, run_interpreted


@dataclass(frozen=True)
class RWKV7Case(Case):
    a: Tensor
    b: Tensor


def make_rwkv7_case(shape, decay, kind, *, packed, dtype, device) -> RWKV7Case:
    """a of length 1, and b = -a times a learning rate for each channel.  decay: also `paper`, down
    to exp(-exp(-1/2)) a token, most of it near 1.  kind: usual, with rates from 0 to 1; hard, with
    every third a nearly the one before, and rates from 0 to 2."""
    case = make_case(
        shape, decay.replace("paper", "normal"), packed=packed, dtype=dtype, device=device,
        vector=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    removed = torch.randn(*shape[:-1], generator=generator)
    rate = torch.rand(*shape[:-1], generator=generator)
    if kind == "hard":
        removed[:, 2::3] = removed[:, 1 : shape[1] - 1 : 3] + 1e-2 * removed[:, 2::3]
        rate *= 2
    removed = F.normalize(removed, dim=-1)
    a, b = (x.to(device, dtype) for x in (-removed, removed * rate))
    case = RWKV7Case(**vars(case), a=a, b=b)
    if decay == "paper":
        g = -math.exp(-0.5) * (10 * torch.rand(*shape[:-1], generator=generator) - 8).sigmoid()
        case = replace(case, g=g.to(device))
    return case


def triton_op(case: RWKV7Case, **options):
    return segmented_rwkv7(
        case.q, case.g, case.k, case.v, case.a, case.b, scale=0.3,
        initial_state=case.initial_state, doc_ids=case.doc_ids, **options,
    )  # fmt: skip


def reference_op(case: RWKV7Case):
    return rwkv7_chunked(
        case.q, case.g, case.k, case.v, case.a, case.b, scale=0.3,
        initial_state=case.initial_state, doc_ids=case.doc_ids,
    )  # fmt: skip


def found_errors(case: RWKV7Case, **options):
    reference = run(reference_op, case, torch.float64)
    return errors(run(lambda c: triton_op(c, **options), case), reference)


def choose(monkeypatch, *, stretch: int, programs: int):
    launch = Launch(16, 4, 1)
    chosen = Settings(16, stretch, launch, launch, launch, launch, launch, programs)
    monkeypatch.setattr(steps, "settings", lambda *_: chosen)


@interpreted
@pytest.mark.parametrize(("decay", "packed"), [("strong", False), ("mixed", True)])
def test_interpreter_matches_reference(decay, packed, monkeypatch):
    """Two segments, the first of two stretches; the second's part of a chunk decays by more than
    exp holds."""
    choose(monkeypatch, stretch=16, programs=2)
    case = make_rwkv7_case(
        (1, 40, 1, 24, 16), decay, "hard", packed=packed, dtype=torch.float32, device="cpu"
    )
    found = found_errors(case)
    assert max(found.values()) < 1e-5, found


@interpreted
def test_one_segment_with_and_without_a_scan(monkeypatch):
    choose(monkeypatch, stretch=32, programs=1)
    case = make_rwkv7_case(
        (2, 17, 1, 16, 24), "normal", "usual", packed=True, dtype=torch.float32, device="cpu"
    )
    for options in ({}, {"scan": LocalScan()}):
        found = found_errors(case, **options)
        assert max(found.values()) < 1e-5, found


def test_in_the_interpreter():
    run_interpreted(__file__)
