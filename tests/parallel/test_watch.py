"""A rank that dies or hangs in an exchange ends the others, who say which rank, layer and phase."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fla_dist.kernels.state import Diagonal, JoinedStates
from fla_dist.parallel.exchange import build_exchange
from fla_dist.parallel.mesh import build_mesh
from fla_dist.parallel.watch import ExchangeError, watching
from tests.parallel import ranks  # noqa: F401 (what ranks are forked from)

WORLD, TIMEOUT = 3, 4.0
EXPECTED = {
    "dies": "rank 0: layer 0, states, backward: .*rank 1 is silent, last in layer 1, states, backw",
    "hangs": "rank 0: layer 0, states, backward: not ended within 4 s: rank 1 is behind, last in "
    "layer 1, states, backward",
}


def rank_main(rank: int, folder: str, fate: str) -> None:
    sys.stderr = open(f"{folder}/stderr_{rank}", "w", buffering=1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    with watching(TIMEOUT, interval_seconds=0.1):
        exchange = build_exchange(build_mesh(WORLD))
        x = torch.ones(1, 2, 4, requires_grad=True)
        y = x
        for layer in range(3):
            if layer == 1 and rank == 1:
                y = _Fate.apply(y, fate)
            scan = exchange.of_layer(layer).scan
            y, _ = JoinedStates(scan, Diagonal(-torch.ones(1, 2, 4)), y, None).wait()
        try:
            y.sum().backward()
        except ExchangeError as error:
            print(error, file=sys.stderr)
            os._exit(3)


class _Fate(torch.autograd.Function):
    """What befalls the rank when the backward comes to a layer."""

    @staticmethod
    def forward(ctx, x, fate):
        ctx.fate = fate
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.5)  # a beat is heard
        if ctx.fate == "dies":
            os._exit(9)
        time.sleep(120)


@pytest.mark.parametrize("fate", EXPECTED)
def test_the_others_end_and_name_it(tmp_path: Path, fate: str) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=rank_main, args=(rank, str(tmp_path), fate)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in (processes[0], processes[2]):
        process.join(60)
        assert process.exitcode not in (None, 0)
    processes[1].kill()
    said = (tmp_path / "stderr_0").read_text()
    assert re.search(EXPECTED[fate], said), said
