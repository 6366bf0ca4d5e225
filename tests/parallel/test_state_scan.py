"""Both exchanges of recurrent states on a simulated cluster of four hosts with two ranks each, in
fp64, against one process that goes token by token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fla_dist.kernels.gla.reference import gla_chunked, gla_recurrent
from fla_dist.kernels.mamba.reference import selective_scan_chunked, selective_scan_recurrent
from fla_dist.kernels.state import LOCAL, Dense, Diagonal, JoinedStates, Scan
from fla_dist.parallel import state_scan
from fla_dist.parallel.exchange import build_exchange
from fla_dist.parallel.mesh import Mesh, build_mesh, choose_state_exchange
from tests.packing import LENGTH, STARTS, doc_ids_of, positions_of
from tests.parallel.ranks import run_ranks

WORLD, RANKS_PER_HOST = 8, 2
LENGTHS = {"equal": (6,) * 8, "unequal": (9, 1, 12, 3, 6, 6, 2, 9)}
EXCHANGES = ("all_gather", "hierarchical")
SHAPES = {
    "q": (2, LENGTH, 3, 4), "k": (2, LENGTH, 3, 4), "v": (2, LENGTH, 3, 5), "g": (2, LENGTH, 3, 4),
    "x": (2, LENGTH, 5), "dt": (2, LENGTH, 5), "B": (2, LENGTH, 3), "C": (2, LENGTH, 3),
    "beta": (2, LENGTH, 3), "A": (5, 3), "state": (2, 3, 4, 5), "mamba_state": (2, 5, 3),
}  # fmt: skip
TIMELESS = ("A", "state", "mamba_state")
"""No number of heads, channels or rows is a multiple of the ranks of a host."""


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial: Tensor, doc_ids: Tensor, *, scan: Scan
) -> tuple[Tensor, Tensor]:
    """S_t = (1 - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t: every token a stretch."""
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = beta.sigmoid()[..., None, None]
    matrix = torch.eye(k.shape[-1], dtype=k.dtype) - beta * k[..., None] * k[..., None, :]
    starts = doc_ids.diff(dim=1, prepend=torch.zeros_like(doc_ids[:, :1])) > 0
    matrix = matrix * ~starts[..., None, None, None]
    added = beta * k[..., None] * v[..., None, :]
    entering, final = JoinedStates(scan, Dense(matrix), added, initial).wait()
    return torch.einsum("bthk,bthkv->bthv", q, matrix @ entering + added), final


def delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial: Tensor, doc_ids: Tensor
) -> tuple[Tensor, Tensor]:
    k, beta, state = torch.nn.functional.normalize(k, dim=-1), beta.sigmoid(), initial
    outputs = []
    before = torch.zeros_like(doc_ids[:, 0])
    for t in range(q.shape[1]):
        state = state * (doc_ids[:, t] == before)[:, None, None, None]
        before = doc_ids[:, t]
        correction = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        update = torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        state = state + beta[:, t, :, None, None] * update
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def call(name: str, x: dict[str, Tensor], doc_ids: Tensor, scan: Scan | None) -> Any:
    """The operator over one slice; token by token where there is no scan."""
    if name == "delta rule":
        arguments = [x[key] for key in ("q", "k", "v", "beta", "state")]
        function = partial(delta_rule, scan=scan) if scan else delta_rule_recurrent
        return function(*arguments, doc_ids)
    options = {} if scan is None else {"scan": scan, "chunk_size": 4}
    if name == "mamba":
        return (selective_scan_chunked if scan else selective_scan_recurrent)(
            x["x"], x["dt"].square(), -x["A"].square(), x["B"], x["C"],
            initial_state=x["mamba_state"], doc_ids=doc_ids, **options,
        )  # fmt: skip
    g = -x["g"].square() if name == "gla" else -x["g"][..., :1].square().expand(x["g"].shape)
    return (gla_chunked if scan else gla_recurrent)(
        x["q"], x["k"], x["v"], g,
        scale=0.5, initial_state=x["state"], doc_ids=doc_ids, **options,
    )  # fmt: skip


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def weight_of(y: Tensor, seed: int) -> Tensor:
    return (torch.arange(y.numel(), dtype=y.dtype).view_as(y) * 0.7 + seed).sin()


def outcome(
    name: str, starts: str, lengths: tuple[int, ...], rank: int, scan: Scan | None
) -> dict[str, Tensor]:
    """Output and final state of a slice, and its share of the gradients of all inputs."""
    every = {key: x.requires_grad_() for key, x in inputs().items()}
    x = {key: y if key in TIMELESS else y.split(lengths, dim=1)[rank] for key, y in every.items()}
    positions = positions_of(STARTS[starts]).expand(2, -1).split(lengths, dim=1)[rank]
    output, final = call(name, x, doc_ids_of(positions), scan)
    weight = weight_of(output.new_empty(2, LENGTH, *output.shape[2:]), 1)
    loss = (output * weight.split(lengths, dim=1)[rank]).sum()
    if rank == len(lengths) - 1:
        loss = loss + (final * weight_of(final, 2)).sum()
    loss.backward()
    gradients = {f"gradient of {k}": y.grad for k, y in every.items() if y.grad is not None}
    return {"output": output.detach(), "final": final.detach(), **gradients}


def cluster() -> dict[Any, float]:
    mesh = build_mesh(WORLD, ranks_per_host=RANKS_PER_HOST)
    assert mesh.state_exchange == "hierarchical"
    errors = {}
    for name in ("gla", "simple gla", "mamba", "delta rule"):
        for starts in ("one document", "many documents", "document over three ranks"):
            expected = outcome(name, starts, (LENGTH,), 0, None)
            for kind, lengths in LENGTHS.items():
                for exchange in EXCHANGES:
                    scan = build_exchange(replace(mesh, state_exchange=exchange)).scan
                    got = outcome(name, starts, lengths, mesh.rank, scan)
                    for key, value in got.items():
                        truth = expected[key]
                        if key == "output":
                            truth = truth.split(lengths, dim=1)[mesh.rank]
                        elif key == "final" and mesh.rank < WORLD - 1:
                            continue
                        elif key.startswith("gradient"):
                            dist.all_reduce(value)
                        errors[name, starts, kind, exchange, key] = (
                            (value - truth).abs().max() / truth.abs().max().clamp(min=1)
                        ).item()
    return errors


def test_a_cluster_equals_one_process() -> None:
    for errors in run_ranks(WORLD, cluster):
        wrong = {case: error for case, error in errors.items() if not error <= 1e-10}
        assert not wrong
        assert len(errors) > 200


def messages() -> dict[str, list[int]]:
    """Bytes of this rank's messages in a forward and a backward."""
    mesh = build_mesh(4, ranks_per_host=2)
    sizes: dict[str, list[int]] = {}
    for exchange in EXCHANGES:
        sizes[exchange] = []

        def counting(collective: Any, counted: list[int] = sizes[exchange]) -> Any:
            def counted_call(out: Tensor, message: Tensor, **options: Any) -> Any:
                counted.append(message.numel() * message.element_size())
                return collective(out, message, **options)

            return counted_call

        names = ("all_gather", "all_to_all")
        patches = {name: counting(getattr(state_scan, name)) for name in names}
        with mock.patch.multiple(state_scan, **patches):
            scan = build_exchange(replace(mesh, state_exchange=exchange)).scan
            outcome("delta rule", "one document", (12,) * 4, mesh.rank, scan)
    return sizes


def test_the_reverse_sends_no_transition() -> None:
    state, matrix = 2 * 3 * 4 * 5 * 8, 2 * 3 * 4 * 4 * 8
    both = state + matrix
    for sizes in run_ranks(4, messages):
        assert sizes["all_gather"] == [both, state]
        # To the host's ranks, half of it across hosts, and the entering states back.
        assert sizes["hierarchical"] == [both, both // 2, state, state, state // 2, state]


def test_dense_stretches_compose() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 5, 3, 4, 6, generator=generator, dtype=torch.float64)
    initial = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    arguments = [x.requires_grad_() for x in (matrix, state, initial)]

    def joined(matrix: Tensor, state: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return JoinedStates(LOCAL, Dense(matrix), state, initial).wait()

    assert torch.autograd.gradcheck(joined, arguments)
    _, final = joined(*arguments)
    _, alone = joined(matrix, state, torch.zeros_like(initial))
    total = Dense(matrix).total().matrix[:, 0]
    torch.testing.assert_close(final, total @ initial + alone, rtol=0, atol=1e-12)


def test_rows_of_a_state_do_not_mix() -> None:
    """A state with decays of its leading dimensions as rows, one decay each."""
    log_decay = -torch.rand(2, 1, 3, 1, 1)
    rate = torch.rand(4, 5)
    state = torch.randn(2, 1, 3, 4, 5)
    transition, rows = Diagonal(log_decay, rate).rows(state)
    assert transition.log_decay.shape == (1, 1, 6, 1) and rows.shape == (1, 1, 6, 20)
    torch.testing.assert_close(
        (transition.factor() * rows).view(2, 3, 4, 5),
        (Diagonal(log_decay, rate).factor() * state)[:, 0],
    )


def test_the_exchange_follows_the_hosts() -> None:
    assert choose_state_exchange("auto", 8, 8) == "all_gather"
    assert choose_state_exchange("auto", 16, 8) == "hierarchical"
    assert choose_state_exchange("auto", 8, 1) == "all_gather"
    assert choose_state_exchange("auto", 12, 8) == "all_gather"  # a host and a half
    assert choose_state_exchange("all_gather", 16, 8) == "all_gather"
    with pytest.raises(ValueError, match="state_exchange is 'hierarchical', expected"):
        choose_state_exchange("hierarchical", 8, 8)
    assert not Mesh(world_size=8, sequence_parallel_size=4, ranks_per_host=8).spans_hosts
