"""Recurrent operators, halos and gathers over 1, 2 and 4 ranks against one process, in fp64.

Outputs, final states and the gradients of every input, of the initial state and of each rank's
final state.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.attention import attention, attention_mask
from fla_dist.kernels.delta_rule.reference import delta_rule_chunked, delta_rule_recurrent
from fla_dist.kernels.gated_delta_rule.reference import (
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
)
from fla_dist.kernels.gla.reference import gla_chunked, gla_recurrent
from fla_dist.kernels.gsa.reference import gsa_chunked, gsa_recurrent
from fla_dist.kernels.hgrn.reference import hgrn_chunked, hgrn_recurrent
from fla_dist.kernels.hgrn2 import hgrn2
from fla_dist.kernels.hgrn2.reference import hgrn2_recurrent
from fla_dist.kernels.kda.reference import kda_chunked, kda_recurrent
from fla_dist.kernels.mamba.reference import selective_scan_chunked, selective_scan_recurrent
from fla_dist.kernels.mamba2 import state_space_dual
from fla_dist.kernels.mamba2.reference import state_space_dual_recurrent
from fla_dist.kernels.rwkv6 import rwkv6
from fla_dist.kernels.rwkv6.reference import rwkv6_recurrent
from fla_dist.kernels.rwkv7.reference import rwkv7_chunked, rwkv7_recurrent
from fla_dist.kernels.short_convolution import short_convolution
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked, simple_gla_recurrent
from fla_dist.kernels.state import LOCAL
from fla_dist.parallel.exchange import build_exchange
from fla_dist.parallel.mesh import Mesh, build_mesh
from tests.packing import LENGTH, STARTS, doc_ids_of, positions_of
from tests.parallel.ranks import run_ranks

WORLD = 4
TOLERANCE = 1e-10


def gla_case(local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    function = gla_recurrent if form == "truth" else gla_chunked
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan, "chunk_size": 5}
    output, state = function(
        x["q"], x["k"], x["v"], -x["g"].square(),
        scale=0.5, initial_state=x["state"], doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def simple_gla_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str, decay: str
) -> dict[str, Tensor]:
    function = simple_gla_recurrent if form == "truth" else simple_gla_chunked
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan, "chunk_size": 5}
    g = {"head": -x["A"][:2, 0].square(), "token": -x["g"][..., 0].square()}[decay]
    output, state = function(
        x["q"], x["k"], x["v"], g,
        scale=0.5, initial_state=x["state"], doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def hgrn2_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str
) -> dict[str, Tensor]:
    function = hgrn2_recurrent if form == "truth" else hgrn2
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan}
    output, state = function(
        x["q"], x["v"], -x["g"].square(),
        scale=0.5, initial_state=x["state"], doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def hgrn_case(local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    function = hgrn_recurrent if form == "truth" else hgrn_chunked
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan, "chunk_size": 5}
    output, state = function(
        x["x"], -x["g1"].square(),
        initial_state=x["mamba_state"][..., 0], doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def delta_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str, family: str
) -> dict[str, Tensor]:
    """Keys of length 1, beta between 0 and 2."""
    recurrent, chunked = DELTA_RULES[family]
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan, "chunk_size": 5}
    q, k, v, g = x["q"], F.normalize(x["k"], dim=-1), x["v"], -x["g"].square()
    beta = 2 * x["k2"].mean(dim=-1).sigmoid()
    arguments = {
        "delta rule": (q, k, v, beta),
        "gated delta rule": (q, k, v, g.mean(dim=-1), beta),
        "kda": (q, k, v, g, beta),
        "rwkv7": (q, g, x["k2"], v, -k, k * beta[..., None] / 2),
    }[family]
    function = recurrent if form == "truth" else chunked
    output, state = function(
        *arguments, scale=0.5, initial_state=x["state"], doc_ids=doc_ids_of(positions), **extra
    )
    return {"output": output, "final": state}


def rwkv6_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str
) -> dict[str, Tensor]:
    function = rwkv6_recurrent if form == "truth" else rwkv6
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan}
    bonus = x["state"][0, :, :, 0]
    output, state = function(
        x["q"], x["k"], x["v"], -x["g"].square(), bonus,
        initial_state=x["state"], doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def gsa_case(local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    function = gsa_recurrent if form == "truth" else gsa_chunked
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan, "chunk_size": 5}
    output, state = function(
        x["q"], x["k2"], x["v"], -x["g"].square(),
        scale=0.5, initial_state=torch.cat([x["state"], x["state"][..., :4]], dim=-1),
        doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def mamba_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str
) -> dict[str, Tensor]:
    function = selective_scan_recurrent if form == "truth" else selective_scan_chunked
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan, "chunk_size": 5}
    output, state = function(
        x["x"], x["g1"].square(), -x["A"].square(), x["B"], x["C"],
        initial_state=x["mamba_state"], doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


def window_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str, window: int
) -> dict[str, Tensor]:
    before = build_exchange(local).before
    k, v = (torch.cat([before(y, window - 1).wait(), y], dim=1) for y in (x["k"], x["k2"]))
    mask = attention_mask(positions, context=window - 1, window=window)
    return {"output": attention(x["q"], k, v, mask)}


def convolution_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str, width: int
) -> dict[str, Tensor]:
    left = build_exchange(local).before(x["x"], width - 1).wait()
    weight = torch.linspace(-1, 1, 3 * width, dtype=x["x"].dtype).view(3, width)
    return {
        "output": short_convolution(x["x"], weight, None, left_context=left, positions=positions)
    }


DELTA_RULES = {
    "delta rule": (delta_rule_recurrent, delta_rule_chunked),
    "gated delta rule": (gated_delta_rule_recurrent, gated_delta_rule_chunked),
    "kda": (kda_recurrent, kda_chunked),
    "rwkv7": (rwkv7_recurrent, rwkv7_chunked),
}


def mamba2_case(
    local: Mesh, positions: Tensor, x: dict[str, Tensor], form: str
) -> dict[str, Tensor]:
    function = state_space_dual_recurrent if form == "truth" else state_space_dual
    extra = {} if form == "truth" else {"scan": build_exchange(local).scan}
    output, state = function(
        x["v"], x["g1"][..., :2].square(), -x["A"][0, :2].square(), x["k"][:, :, :1],
        x["k2"][:, :, :1], D=x["A"][1, :2], initial_state=x["state"],
        doc_ids=doc_ids_of(positions), **extra,
    )  # fmt: skip
    return {"output": output, "final": state}


CASES = {
    **{family: (delta_case, {"family": family}) for family in DELTA_RULES},
    "gla": (gla_case, {}),
    "gsa": (gsa_case, {}),
    "hgrn": (hgrn_case, {}),
    "hgrn2": (hgrn2_case, {}),
    "mamba": (mamba_case, {}),
    "mamba2": (mamba2_case, {}),
    "rwkv6": (rwkv6_case, {}),
    "retention": (simple_gla_case, {"decay": "head"}),
    "simple gla": (simple_gla_case, {"decay": "token"}),
    "window inside a slice": (window_case, {"window": 5}),
    "slice shorter than the window": (window_case, {"window": 31}),
    "window longer than the sequence": (window_case, {"window": 100}),
    "window of one": (window_case, {"window": 1}),
    "convolution": (convolution_case, {"width": 4}),
    "slice shorter than the convolution": (convolution_case, {"width": 16}),
}
TIMELESS = ("A", "state", "mamba_state")


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        **{name: (2, LENGTH, 2, 4) for name in ("q", "k", "k2", "g")},
        "v": (2, LENGTH, 2, 6),
        **{name: (2, LENGTH, 3) for name in ("x", "g1")},
        **{name: (2, LENGTH, 5) for name in ("B", "C")},
        "A": (3, 5),
        "state": (2, 2, 4, 6),
        "mamba_state": (2, 3, 5),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def weight_of(y: Tensor, position: int) -> Tensor:
    """The loss' weight of each number, told by its place in the whole sequence."""
    index = torch.arange(y.numel(), dtype=torch.float64).view_as(y)
    return (index + position).sin()


def run_case(name: str, starts: str, size: int, mesh: Mesh) -> dict[str, Tensor]:
    """Outputs and gradients of this rank's slice."""
    case, options = CASES[name]
    rank = mesh.sequence_parallel_rank
    every = {key: x.clone().requires_grad_() for key, x in inputs().items()}
    local = {key: x if key in TIMELESS else x.chunk(size, dim=1)[rank] for key, x in every.items()}
    positions = positions_of(STARTS[starts]).expand(2, -1)
    form = "truth" if size == 1 else "parallel"
    outputs = case(mesh, positions.chunk(size, dim=1)[rank], local, form, **options)
    weights = weight_of(inputs()["v" if name == "gla" else "k"].new_empty(2, LENGTH, 12), 0)
    output = outputs["output"].flatten(2)
    loss = (output * weights.chunk(size, dim=1)[rank][..., : output.shape[2]]).sum()
    if "final" in outputs and rank == size - 1:
        loss = loss + (outputs["final"] * weight_of(outputs["final"], 7)).sum()
    loss.backward()
    gathered = {f"gradient of {k}": x.grad for k, x in every.items() if x.grad is not None}
    if size > 1:
        for gradient in gathered.values():
            dist.all_reduce(gradient, group=mesh.sequence_group)
        parts = [torch.empty_like(output) for _ in range(size)]
        dist.all_gather(parts, output.detach(), group=mesh.sequence_group)
        output = torch.cat(parts, dim=1)
    gathered["output"] = output.detach()
    if "final" in outputs and rank == size - 1:
        gathered["final"] = outputs["final"].detach()
    return gathered


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The error itself where zero is expected: the gradient of a state that no token sees."""
    return ((got - expected).norm() / (expected.norm() or 1)).item()


def all_cases() -> dict[tuple[str, str, int], dict[str, float]]:
    torch.set_num_threads(1)
    meshes = {size: build_mesh(size) for size in (2, 4)}
    errors = {}
    for name in CASES:
        for starts in STARTS:
            expected = run_case(name, starts, 1, Mesh())
            for size, mesh in meshes.items():
                got = run_case(name, starts, size, mesh)
                assert set(expected) - set(got) <= {"final"}
                errors[name, starts, size] = {
                    key: relative_error(got[key], expected[key]) for key in got
                }
    return errors


@pytest.fixture(scope="module")
def errors() -> list[dict[tuple[str, str, int], dict[str, float]]]:
    return run_ranks(WORLD, all_cases)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("name", CASES)
def test_divided_equals_whole(errors, name: str, starts: str, size: int) -> None:
    for rank, of_rank in enumerate(errors):
        for key, error in of_rank[name, starts, size].items():
            assert error <= TOLERANCE, f"rank {rank}: {key}"


@pytest.mark.parametrize("ranks_per_host", [2, 4])
def test_every_rank_may_give_its_final_state_a_gradient(ranks_per_host: int) -> None:
    """All slices' final states in one loss, against the same slices one after the other."""
    for gradient, expected in run_ranks(WORLD, final_state_gradients, ranks_per_host):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def final_state_gradients(ranks_per_host: int) -> tuple[Tensor, Tensor]:
    mesh = build_mesh(WORLD, ranks_per_host=ranks_per_host)
    rank = mesh.sequence_parallel_rank
    names = ("q", "k", "v", "g")
    gradients = []
    for divided in (True, False):
        x = {key: value.clone().requires_grad_() for key, value in inputs().items()}
        loss = torch.zeros((), dtype=torch.float64)
        state = x["state"]
        for index in [rank] if divided else range(WORLD):
            parts = [x[name].chunk(WORLD, dim=1)[index] for name in names]
            parts[3] = -parts[3].square()
            scan = build_exchange(mesh).scan if divided else LOCAL
            output, state = gla_chunked(*parts, scale=1.0, initial_state=state, scan=scan)
            loss = loss + output.sum() + (state * weight_of(state, index)).sum()
        loss.backward()
        gradients.append(torch.cat([x[n].grad.flatten() for n in (*names, "state")]))
    dist.all_reduce(gradients[0])
    return gradients[0], gradients[1]
