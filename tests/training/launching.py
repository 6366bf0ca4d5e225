"""Starts real runs as a user does, small enough for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "launch/pretrain.py"

RUN: dict[str, Any] = {
    "model": {
        "layer_pattern": ["mamba", "sliding_window_attention"],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 512,
        "mixers": {
            "mamba": {"state_size": 4},
            "sliding_window_attention": {"num_heads": 2, "num_kv_heads": 2, "window_size": 24},
        },
    },
    "tokenizer": {"train": {"vocab_size": 512, "max_bytes": 60000}},
    "data": {"sequence_length": 64, "seed": 1, "lanes": 2},
    "training": {"max_steps": 10, "global_batch_tokens": 512, "seed": 1},
    "optimizer": {"lr": 1e-2},
    "lr_scheduler": {"type": "wsd", "warmup_steps": 2},
    "parallelism": {"sequence_parallel_size": 2},
    "checkpoint": {"interval_steps": 3, "keep_latest": 2},
    "evaluation": {"interval_steps": 5, "sequences": 8, "sequence_lengths": [32, 64]},
    "logging": {"interval_steps": 2},
    "deepspeed": {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
    },
}


def write_run(folder: Path, text: Path, cache: Path, **sections: dict[str, Any]) -> Path:
    """The config file of a run that reads `text` and keeps all it writes in `folder`."""
    tree = json.loads(json.dumps(RUN))
    source = [{"path": str(text)}]
    tree["data"].update(sources=source, validation_sources=source, cache_dir=str(cache))
    tree["checkpoint"]["dir"] = str(folder / "checkpoints")
    tree["logging"]["dir"] = str(folder)
    for name, values in sections.items():
        tree[name].update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(tree))
    return path


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]


def forked(ranks: int) -> list[str]:
    """Where the launcher itself does not matter, and it is over in a third of the time."""
    return [sys.executable, "-m", "tests.training.forked", str(ranks)]


def deepspeed(ranks: int) -> list[str]:
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), f"--num_accelerators={ranks}", f"--master_port={free_port()}"]


PYTHON = [sys.executable]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(launcher: list[str], *arguments: str) -> subprocess.Popen[str]:
    """The run as a process group of its own, its output in one pipe."""
    return subprocess.Popen(
        [*launcher, SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """The exit code and all output; a run that hangs is killed and fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"hung; it said:\n{output}") from None
    return process.returncode, output


def run(launcher: list[str], *arguments: str) -> tuple[int, str]:
    return finish(start(launcher, *arguments))


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, under whatever launcher, in the order of their ranks."""
    family = psutil.Process(process.pid).children(recursive=True) + [psutil.Process(process.pid)]
    ranks = [p for p in family if len(p.cmdline()) > 1 and SCRIPT in p.cmdline()[1:3]]
    return sorted(ranks, key=lambda p: int(p.environ().get("RANK", 0)))


def records(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / "logs" / f"rank_{rank:05d}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # the last may still be in the writing
    return [json.loads(line) for line in lines]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while not any(record["step"] >= step for record in records(folder)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.02)
