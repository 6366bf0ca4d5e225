"""Halos over slices of different lengths, some shorter than the halo, against one process."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fla_dist.models.layers import Normed, RMSNorm
from fla_dist.models.mixers.attention import SlidingWindowAttention, SlidingWindowAttentionConfig
from fla_dist.models.stream import Stream
from fla_dist.parallel import halo
from fla_dist.parallel.collectives import Transfer
from fla_dist.parallel.exchange import (
    LocalExchange,
    MeshExchange,
    ReplayedExchange,
    build_exchange,
)
from fla_dist.parallel.mesh import Mesh, build_mesh
from fla_dist.parallel.slices import Slices
from tests.packing import positions_of
from tests.parallel.ranks import run_ranks

LENGTHS = {"equal": (5, 5, 5, 5), "unequal": (9, 1, 3, 7)}
WIDTHS = (0, 1, 3, 5, 12, 30)
TOTAL = 20


def halos() -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Each halo, and the gradient that every rank's halo gives to this rank's slice."""
    mesh = build_mesh(4)
    rank = mesh.rank
    found = {}
    for name, lengths in LENGTHS.items():
        exchange = build_exchange(mesh, lengths)
        for width in WIDTHS:
            x = sequence().split(lengths, dim=1)[rank].requires_grad_()
            before = exchange.before(x, width).wait()
            (before * weight(width, rank)).sum().backward()
            assert x.grad is not None
            found[name, width] = before.detach(), x.grad
    return found


def sequence() -> Tensor:
    return torch.arange(1.0, 2 * TOTAL * 3 + 1, dtype=torch.float64).view(2, TOTAL, 3)


def weight(width: int, rank: int) -> Tensor:
    return torch.arange(2 * width * 3, dtype=torch.float64).view(2, width, 3) + 100 * rank


def test_halos_reach_over_as_many_slices_as_they_need() -> None:
    for rank, found in enumerate(run_ranks(4, halos)):
        for (name, width), (before, gradient) in found.items():
            lengths = LENGTHS[name]
            starts = [sum(lengths[:i]) for i in range(4)]
            padded = torch.cat([torch.zeros(2, width, 3, dtype=torch.float64), sequence()], dim=1)
            expected = torch.zeros_like(padded)
            for other, start in enumerate(starts):
                expected[:, start : start + width] += weight(width, other)
            assert torch.equal(before, padded[:, starts[rank] : starts[rank] + width])
            assert torch.equal(gradient, expected[:, width:].split(lengths, dim=1)[rank])


def slices_behind_halos() -> dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]:
    """Two slices behind their halos, sent together, and their gradients; each also under
    recomputation."""
    mesh = build_mesh(4)
    rank = mesh.rank
    found = {}
    for name, lengths in LENGTHS.items():
        for width in WIDTHS:
            replayed = ReplayedExchange(build_exchange(mesh, lengths))
            first, again = replayed.contexts()
            x = sequence().split(lengths, dim=1)[rank]
            xs = [x.clone().requires_grad_(), (-2 * x).requires_grad_()]
            with first:
                wholes = replayed.with_halo(tuple(xs), width)
            with again:
                for whole, same in zip(wholes, replayed.with_halo(tuple(xs), width), strict=True):
                    assert torch.equal(whole, same)
            context = wholes[0].shape[1] - x.shape[1]
            factors = weight(width + x.shape[1], rank)[:, width - context :]
            sum((whole * factors).sum() for whole in wholes).backward()
            found[name, width] = [w.detach() for w in wholes], [x.grad for x in xs]
    return found


def test_slices_behind_their_halos() -> None:
    for rank, found in enumerate(run_ranks(4, slices_behind_halos)):
        for (name, width), (wholes, gradients) in found.items():
            lengths = LENGTHS[name]
            starts = [sum(lengths[:i]) for i in range(5)]
            begin, end = starts[rank], starts[rank + 1]
            expected = torch.zeros_like(sequence())
            for other in range(4):
                first = max(0, starts[other] - width)
                factors = weight(width + lengths[other], other)
                expected[:, first : starts[other + 1]] += factors[
                    :, width - (starts[other] - first) :
                ]
            seen = sequence()[:, max(0, begin - width) : end]
            for whole, gradient, scale in zip(wholes, gradients, (1, -2), strict=True):
                assert torch.equal(whole, scale * seen)
                assert torch.equal(gradient, expected[:, begin:end])


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When halos set out and are waited for, and what else a test notes."""
    noted: list[str] = []

    class Noted(Transfer):
        def __init__(self, steps, slices, phase, device) -> None:
            noted.append(f"{phase}, starts")
            self.phase = phase
            super().__init__(steps, slices, phase, device)

        def wait(self) -> Tensor:
            noted.append(f"{self.phase}, waits")
            return super().wait()

    monkeypatch.setattr(halo, "Transfer", Noted)
    return noted


class Work(torch.autograd.Function):
    """Notes when it is done, forward and backward."""

    @staticmethod
    def forward(ctx, x, name, events):
        ctx.name, ctx.events = name, events
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.events.append(f"{ctx.name}, backward")
        return gradient, None, None


ALONE = Slices(Mesh())
"""One rank whose halos go through every step, but are sent nowhere."""


@pytest.mark.parametrize("recorded", [False, True])
def test_what_needs_no_halo_is_done_while_it_is_under_way(events, recorded: bool) -> None:
    exchange = MeshExchange(ALONE)
    x = torch.ones(1, 4, 2, requires_grad=True)
    pending = (ReplayedExchange(exchange) if recorded else exchange).before(x, 2)
    done = Work.apply(x, "work", events)
    (pending.wait().sum() + done.sum()).backward()
    assert events == [
        "halo, forward, starts", "work", "halo, forward, waits",
        "halo, backward, starts", "work, backward", "halo, backward, waits",
    ]  # fmt: skip


@pytest.mark.parametrize("backward", [False, True])
def test_a_halo_is_freed_with_its_graph(backward: bool) -> None:
    """Also without the garbage collector, which does not see what a cycle of nodes holds."""
    gc.disable()
    try:
        x = torch.ones(1, 4, 2, requires_grad=True)
        pending = MeshExchange(ALONE).before(x * 2, 2)
        watched = weakref.ref(pending._link)
        total = pending.wait().sum()
        if backward:
            total.backward()
        del pending, total
        assert watched() is None
    finally:
        gc.enable()


def windowed(exchange: MeshExchange | LocalExchange, device: str, compiled: bool) -> list[Tensor]:
    """Output and gradients of a windowed layer over 1024 tokens in documents."""
    torch.manual_seed(0)
    mixer = SlidingWindowAttention(128, SlidingWindowAttentionConfig(2, 2, window_size=300), 1e-6)
    norm = RMSNorm(128, 1e-6).to(device)
    mixer.to(device)
    x = torch.randn(1, 1024, 128).to(device).requires_grad_()
    positions = positions_of([0, 90, 700], 1024)[None].to(device)
    stream = Stream(positions, (positions == 0).cumsum(dim=1).int(), exchange)
    mixer.prepare(stream)
    o = (torch.compile(mixer) if compiled else mixer)(Normed(x, norm), stream)
    (o * o.detach().sin()).sum().backward()
    return [o.detach(), x.grad, *(p.grad for p in mixer.parameters())]


def check_windows(device: str, compiled: bool) -> None:
    """Keys and values on their way through the exchange, against those of one process."""
    got = windowed(MeshExchange(ALONE), device, compiled)
    for x, y in zip(got, windowed(LocalExchange(), device, False), strict=True):
        assert (x - y).norm() <= 1e-3 * y.norm()


def test_windows_see_keys_that_went_through_the_exchange() -> None:
    check_windows("cpu", False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_windows_see_keys_that_went_through_the_exchange_on_a_gpu(compiled: bool) -> None:
    """Through the exchanges' own stream, and FlexAttention."""
    check_windows("cuda", compiled)
