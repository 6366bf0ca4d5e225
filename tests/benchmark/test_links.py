"""α and B from timings, and back from the file into the dry run's links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fla_dist.benchmark.links import fit, measure
from fla_dist.parallel.cost import Link, Links, read_links
from fla_dist.parallel.mesh import build_mesh
from tests.parallel.ranks import run_ranks


def test_the_fit_finds_what_made_the_times() -> None:
    rows = [
        {"link": "host", "collective": name, "received_bytes": n, "seconds": 2e-5 + n / 3e11}
        for name in ("all_gather", "all_to_all")
        for n in (1 << 14, 1 << 18, 1 << 22)
    ]
    found = fit(rows, "host")
    assert found["alpha_seconds"] == pytest.approx(2e-5)
    assert found["bytes_per_second"] == pytest.approx(3e11)


def test_the_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text(json.dumps({"links": {"host": {"alpha_seconds": 1, "bytes_per_second": 2}}}))
    assert read_links(path) == Links(host=Link(1, 2))
    path.write_text("[]")
    with pytest.raises(ValueError, match="links.json: not a result of launch/benchmark.py links"):
        read_links(path)


def measured() -> list[dict]:
    mesh = build_mesh(4, ranks_per_host=2)
    return measure(mesh, torch.device("cpu"), [1 << 12])


def test_both_kinds_of_link_are_measured() -> None:
    rows = run_ranks(4, measured)[0]
    received = {(row["link"], row["collective"]): row["received_bytes"] for row in rows}
    pair = {"all_gather": 4096, "all_to_all": 2048, "shift": 4096}
    assert received == {(link, c): n for link in ("host", "hosts") for c, n in pair.items()}
    assert all(row["seconds"] > 0 and row["ranks"] == 2 for row in rows)
