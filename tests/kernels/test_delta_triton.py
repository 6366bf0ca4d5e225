"""The kernels of the gated delta rule, with and without gates, in Triton's interpreter, fp32,
against the fp64 reference."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.launch import Launch
from fla_dist.kernels.delta_rule.reference import delta_rule_chunked
from fla_dist.kernels.gated_delta_rule import steps
from fla_dist.kernels.gated_delta_rule.op import segmented_gated_delta_rule
from fla_dist.kernels.gated_delta_rule.reference import gated_delta_rule_chunked
from fla_dist.kernels.gated_delta_rule.settings import Settings
from fla_dist.kernels.state import LocalScan
from tests.kernels.gradient_check import Case, errors, make_case, run
from tests.kernels.interpreter import interpreted, run_interpreted


@dataclass(frozen=True)
class DeltaCase(Case):
    beta: Tensor


def make_delta_case(shape, decay, kind, *, packed, dtype, device, group=1) -> DeltaCase:
    """Keys of length 1.  kind: usual, with beta from 0 to 1; hard, with every third key nearly the
    one before and beta from 0 to 2; parallel, with all keys nearly the same and beta likewise."""
    case = make_case(shape, decay, packed=packed, dtype=dtype, device=device, vector=False)
    generator = torch.Generator().manual_seed(1)
    batch, length, heads, key_size, _ = shape
    keys = torch.randn(batch, length, heads, key_size, generator=generator)
    if kind == "parallel":
        keys = keys[:, :1] + 1e-2 * keys
    elif kind == "hard":
        keys[:, 2::3] = keys[:, 1 : length - 1 : 3] + 1e-2 * keys[:, 2::3]
    keys = F.normalize(keys, dim=-1).to(device, dtype)[:, :, : heads // group]
    beta = (1 if kind == "usual" else 2) * torch.rand(batch, length, heads, generator=generator)
    beta[:, ::7] = 0
    queries = case.q[:, :, : heads // group].contiguous()
    fields = {**vars(case), "q": queries, "k": keys.contiguous()}
    return DeltaCase(**fields, beta=beta.to(device))


def triton_op(case: DeltaCase, **options):
    return segmented_gated_delta_rule(
        case.q, case.k, case.v, case.g, case.beta, scale=0.3,
        initial_state=case.initial_state, doc_ids=case.doc_ids, **options,
    )  # fmt: skip


def reference_op(case: DeltaCase):
    group = case.v.shape[2] // case.q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (case.q, case.k))
    options = dict(
        scale=0.3, initial_state=case.initial_state, doc_ids=case.doc_ids, chunk_size=64
    )  # fmt: skip
    if case.g is None:
        return delta_rule_chunked(q, k, case.v, case.beta, **options)
    return gated_delta_rule_chunked(q, k, case.v, case.g, case.beta, **options)


def found_errors(case: DeltaCase, **options):
    reference = run(reference_op, case, torch.float64)
    return errors(run(lambda c: triton_op(c, **options), case), reference)


def choose(monkeypatch, chunk: int, *, programs: int):
    launch = Launch(16, 4, 1)
    chosen = Settings(chunk, launch, launch, launch, launch, launch, launch, programs)
    monkeypatch.setattr(steps, "settings", lambda *_: chosen)


@interpreted
@pytest.mark.parametrize(
    ("decay", "packed"), [("none", False), ("none", True), ("strong", False), ("mixed", True)]
)
def test_interpreter_matches_reference(decay, packed, monkeypatch):
    """Two segments of two chunks; the last one's part of a chunk decays by more than exp holds."""
    choose(monkeypatch, 16, programs=2)
    case = make_delta_case(
        (1, 56, 1, 16, 24), decay.replace("none", "normal"), "hard", packed=packed,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    found = found_errors(replace(case, g=None) if decay == "none" else case)
    assert max(found.values()) < 1e-5, found


@interpreted
def test_larger_chunks_and_grouped_heads(monkeypatch):
    choose(monkeypatch, 64, programs=10**9)
    case = make_delta_case(
        (1, 70, 2, 24, 16), "normal", "parallel", packed=True,
        dtype=torch.float32, device="cpu", group=2,
    )  # fmt: skip
    found = found_errors(case)
    assert max(found.values()) < 1e-5, found


@interpreted
def test_one_segment_with_and_without_a_scan(monkeypatch):
    choose(monkeypatch, 16, programs=1)
    case = make_delta_case(
        (1, 70, 1, 16, 16), "normal", "hard", packed=True, dtype=torch.float32, device="cpu"
    )
    for options in ({}, {"scan": LocalScan()}):
        found = found_errors(case, **options)
        assert max(found.values()) < 1e-5, found
    with torch.no_grad():
        without_backward, _ = triton_op(case)
    assert torch.equal(without_backward, run(triton_op, case)["o"])


def test_in_the_interpreter():
    run_interpreted(__file__)
