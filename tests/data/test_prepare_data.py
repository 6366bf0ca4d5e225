"""launch/prepare_data.py as a user runs it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "prepare_data.py"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path, data_config, monkeypatch, capsys):
    config = {
        "model": {
            "layer_pattern": ["mamba"],
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "vocab_size": 512,
        },
        "tokenizer": {"train": {"vocab_size": 300, "sources": [{"path": "python-docs:"}]}},
        "data": {
            "sources": [vars(source) for source in data_config.sources],
            "validation_sources": [{"path": "python-docs:"}],
            "sequence_length": 256,
            "cache_dir": str(tmp_path / "cache"),
        },
        "training": {"max_steps": 1, "global_batch_tokens": 256},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"dir": str(tmp_path)},
        "logging": {"dir": str(tmp_path)},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run_command(command: str, *overrides: str) -> Result:
        arguments = [str(SCRIPT), command, "--config", str(tmp_path / "config.json"), *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return Result(ended.value.code, *capsys.readouterr())

    return run_command


def test_build_verify_inspect(run, tmp_path):
    early = run("inspect")
    assert early.returncode == 1 and "run build first" in early.stderr
    assert run("build").returncode == 0
    assert run("verify").returncode == 0
    shown = run("inspect")
    assert shown.returncode == 0, shown.stderr
    for part in (
        "24 documents",
        "blend of the first 1,000 sequences",
        "data.sources.0: 75.",
        "[0, ",
    ):
        assert part in shown.stdout

    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    unread = subprocess.run(
        [sys.executable, SCRIPT, "inspect", "--config", tmp_path / "config.json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (unread.returncode, unread.stderr) == (0, "")

    shard = next((tmp_path / "cache" / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    damaged = run("verify")
    assert damaged.returncode == 1 and shard.name in damaged.stderr
    assert run("build").returncode == 0 and run("verify").returncode == 0


def test_what_a_user_can_get_wrong_is_one_line(run):
    refused = run("build", "--data.sources.0.text_field", "text")
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert "no field 'text'; its fields are body" in line
    refused = run("build", "--data.sources.0.path", "nowhere.txt")
    assert refused.stderr == "error: data.sources.0.path: nowhere.txt: no such file\n"
    refused = run("build", "--tokenizer.train.vocab_size", "600")
    assert refused.returncode == 2 and "model.vocab_size" in refused.stderr


def test_best_fit_is_shown(run):
    assert run("build").returncode == 0
    shown = run("inspect", "--data.packing", "best_fit")
    assert "first sequence: 256 tokens" in shown.stdout


def test_train_tokenizer(run, tmp_path):
    trained = run("train-tokenizer")
    assert trained.returncode == 0 and trained.stdout.endswith("tokenizer.json: 300 tokens\n")
    path = trained.stdout.rpartition(":")[0]
    refused = run("train-tokenizer", "--tokenizer", json.dumps({"path": path}))
    assert refused.returncode == 2 and "trains none" in refused.stderr


def test_quarantined_units_are_listed(run, data_config, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    built = run(
        "build",
        "--data.sources.1.path",
        str(tmp_path / "bad.txt"),
        "--data.on_bad_source",
        "quarantine",
    )
    assert built.returncode == 0
    assert "quarantined: data.sources.1: " in built.stderr and "bad.txt:1: byte 0" in built.stderr
