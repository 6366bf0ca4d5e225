"""Timing ops: what comes of the rows that the processes of the ops tell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fla_dist.benchmark import op_times
from fla_dist.benchmark.ops import SHAPES

TIMES = {
    "forward_ms": 1.0,
    "forward_backward_ms": 4.0,
    "peak_extra_mib": 512.0,
    "first_call_seconds": 6.5,
    "floor_ms": 1.0,
    "peer": None,
}


def told(op: str, **times: object) -> str:
    row = {"op": op, "shape": vars(SHAPES[0]), "dtype": "bf16", "errors": {"o": 2e-3}, **times}
    return json.dumps(row)


SPOKEN = {
    "gla": [told("gla", **TIMES), told("gla", **TIMES)],
    "retention": [told("retention"), told("retention", **TIMES)],  # the first one is wrong
    "hgrn": [told("hgrn", **TIMES)],  # then it ends
}


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def server(name: str, shapes: int) -> Iterator[subprocess.Popen[str]]:
        lines = ["ready", *SPOKEN[name]]
        code = f"print({lines[0]!r}, flush=True)\n"
        code += "".join(f"input()\nprint({line!r}, flush=True)\n" for line in lines[1:])
        process = subprocess.Popen(
            [sys.executable, "-c", code + "raise SystemExit(3)"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    monkeypatch.setattr(op_times, "server", server)


def test_right_rows_are_written_and_others_told(
    spoken: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ops.json"
    assert not op_times.benchmark(["gla", "retention", "hgrn"], 2, str(path), "the command")
    found = json.loads(path.read_text())
    assert found["environment"]["command"] == "the command"
    assert [row["op"] for row in found["rows"]] == ["gla", "hgrn", "gla", "retention"]
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == [
        "gla", "1,32768,16,128,128", "1.000", "4.000", "1.000", "25", "512", "6.5", "o", "2.0e-03"
    ]  # fmt: skip
    assert "refused: o 2.0e-03" in table[2] and "retention" in table[2]
    assert "failed: it ended with exit code 3" in table[6] and "hgrn" in table[6]


def test_all_right(spoken: None, tmp_path: Path) -> None:
    assert op_times.benchmark(["gla"], 2, str(tmp_path / "ops.json"), "")
