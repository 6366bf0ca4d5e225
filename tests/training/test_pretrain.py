"""Whole runs under the launchers: records, exact resume, signals, and clear refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from tests.training import launching
from tests.training.launching import (
    PYTHON,
    deepspeed,
    finish,
    forked,
    records,
    run,
    torchrun,
    write_run,
)

STEPS = 10


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: documents of the language reference that Python comes with."""
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    documents = [topics[name] for name in sorted(topics) if len(topics[name]) < 4000][:40]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path, cache: Path) -> Path:
    """An uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = run(torchrun(2), "--config", write_run(folder, text, cache))
    assert code == 0, output
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run's folder, to do harm to."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    return folder


def losses(folder: Path) -> dict[int, tuple[float, float, int]]:
    """By step, the last record of it: what must not change over an interruption."""
    return {r["step"]: (r["loss"], r["grad_norm"], r["tokens"]) for r in records(folder)}


def test_records(whole: Path) -> None:
    for rank in (0, 1):
        steps = records(whole, rank)
        assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
        for record in steps:
            for phase in ("step", "data", "forward", "backward", "optimizer"):
                assert record[f"{phase}_seconds"] > 0
            assert record["communication_wait_seconds"] >= 0
            assert record["tokens_per_second_per_gpu"] > 0
            assert record["host_rss_peak_gib"] > 0
            assert record["skipped_steps"] == record["quarantined_units"] == 0
    first, last = records(whole)[0], records(whole)[-1]
    assert last["loss"] < first["loss"] - 0.5
    assert last["tokens"] == STEPS * 512


def test_a_second_stage_goes_on_at_another_sequence_length(
    finished: Path, text: Path, cache: Path
) -> None:
    """As configs/samba_staged_4k.json and samba_staged_32k.json do: same checkpoints, same tokens a
    step."""
    path = write_run(
        finished,
        text,
        cache,
        data={"sequence_length": 128},
        training={"max_steps": STEPS + 3},
        checkpoint={"dir": str(finished / "checkpoints"), "resume": "required"},
        deepspeed={"train_micro_batch_size_per_gpu": 1},
    )
    before = records(finished)
    code, output = run(forked(2), "--config", path)
    assert code == 0, output
    after = records(finished)[STEPS:]
    assert [record["step"] for record in after] == [STEPS + 1, STEPS + 2, STEPS + 3]
    assert [record["tokens"] for record in after] == [512 * n for n in (11, 12, 13)]
    assert after[0]["loss"] < before[0]["loss"] - 0.5  # the first stage's weights


def test_tensorboard_tags(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss/train",
        "loss/validation_32",
        "loss/validation_64",
        "optimizer/lr",
        "optimizer/grad_norm",
        "throughput/tokens_per_second_per_gpu",
        "progress/tokens",
        "memory/host_rss_gib/max",
        "time/forward_seconds/median",
        "time/step_seconds/argmax_rank",
    } <= tags
    assert [event.step for event in events.Scalars("loss/train")] == [2, 4, 6, 8, 10]
    assert (whole / "tensorboard" / "rank_00001").is_dir()


def test_old_checkpoints_are_deleted(whole: Path) -> None:
    names = sorted(path.name for path in (whole / "checkpoints").glob("*_0*"))
    assert names == ["step_00000009", "step_00000010"]
    assert (whole / "checkpoints" / "latest").read_text() == "step_00000010"


def test_killed_at_a_random_step_and_resumed(
    tmp_path: Path, text: Path, cache: Path, whole: Path
) -> None:
    config = write_run(tmp_path, text, cache)
    process = launching.start(torchrun(2), "--config", config)
    step = random.randint(1, STEPS - 1)
    launching.wait_for_step(process, tmp_path, step)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = max(losses(tmp_path))
    code, output = run(torchrun(2), "--config", config)
    assert code == 0, output
    assert losses(tmp_path) == losses(whole), f"killed after step {step}, at {reached}"


def test_a_signal_to_one_rank_saves_on_all_and_leaves(
    tmp_path: Path, text: Path, cache: Path, whole: Path
) -> None:
    config = write_run(tmp_path, text, cache, checkpoint={"interval_steps": 1000})
    process = launching.start(torchrun(2), "--config", config)
    launching.wait_for_step(process, tmp_path, 2)
    ranks = launching.ranks_of(process)
    ranks[1].send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0 and "stopped by a signal" in output
    assert "exitcode  : 75" in output
    stopped = max(losses(tmp_path))
    assert (tmp_path / "checkpoints" / f"step_{stopped:08d}").is_dir()
    code, output = run(torchrun(2), "--config", config)
    assert code == 0, output
    assert losses(tmp_path) == losses(whole)


def test_plain_python_and_its_exit_code(tmp_path: Path, text: Path, cache: Path) -> None:
    config = write_run(tmp_path, text, cache, training={"max_steps": 1000})
    arguments = ("--config", config, "--parallelism.sequence_parallel_size", "1")
    process = launching.start(PYTHON, *arguments)
    launching.wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75, output


def test_deepspeed_launcher(tmp_path: Path, text: Path, cache: Path, whole: Path) -> None:
    code, output = run(deepspeed(2), "--config", write_run(tmp_path, text, cache))
    assert code == 0, output
    assert losses(tmp_path) == losses(whole)


def test_two_nodes_over_loopback(tmp_path: Path, text: Path, cache: Path, whole: Path) -> None:
    config = write_run(tmp_path, text, cache)
    port = str(launching.free_port())
    nodes = [
        launching.start(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"],
            "--config",
            config,
        )
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        code, output = finish(node)
        assert code == 0, output
    assert losses(tmp_path) == losses(whole)


def test_generation_from_a_checkpoint(whole: Path) -> None:
    done = subprocess.run(
        [*PYTHON, "launch/generate.py", "--checkpoint", str(whole / "checkpoints"),
         "--prompt", "The function", "--max-new-tokens", "8"],
        cwd=launching.ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step_00000010" in done.stdout and "The function" in done.stdout


# Checkpoints that cannot be used ------------------------------------------------------------------


def resume(folder: Path, *overrides: str) -> tuple[int, str]:
    return run(forked(2), "--config", str(folder / "run.json"), *own_paths(folder), *overrides)


def own_paths(folder: Path) -> list[str]:
    return ["--checkpoint.dir", str(folder / "checkpoints"), "--logging.dir", str(folder)]


@pytest.mark.parametrize(
    "harm",
    [
        "flipped",
        pytest.param("cut", marks=pytest.mark.slow),
        pytest.param("missing", marks=pytest.mark.slow),
        "no manifest",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    finished: Path, whole: Path, harm: str
) -> None:
    newest = finished / "checkpoints" / "step_00000010"
    file = newest / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:1000])
    elif harm == "missing":
        file.unlink()
    else:
        file = newest / "manifest.json"
        file.unlink()
    code, output = resume(finished)
    assert code == 0, output
    assert f"{newest} is damaged" in output and file.name in output
    assert records(finished)[STEPS]["step"] == 10  # step 9's checkpoint, then one step
    assert losses(finished) == losses(whole)


def test_only_damaged_checkpoints_stop_the_run(finished: Path) -> None:
    for path in (finished / "checkpoints").glob("step_*"):
        (path / "state.json").write_text("{}")
    code, output = resume(finished)
    assert code != 0 and refusals(output) == 1
    assert "no checkpoint" in output and "state.json" in output
    assert len(list((finished / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--model.hidden_size", "64"], ["another model", "model.hidden_size is 32 there"]),
        (["--deepspeed.zero_optimization.stage", "1"], ["another layout", "stage is 2 there"]),
        (["--data.seed", "2"], ["data.seed"]),
        (["--checkpoint.resume", "never"], ["checkpoint.resume is 'never'"]),
        (
            ["--checkpoint.resume", "required", "--checkpoint.dir", "runs/absent"],
            ["runs/absent holds no checkpoint"],
        ),
    ],
)
def test_checkpoints_that_do_not_fit(
    finished: Path, overrides: list[str], parts: list[str]
) -> None:
    code, output = resume(finished, *overrides)
    assert code != 0 and refusals(output) == 1, output
    for part in parts:
        assert part in output


# Bad input ----------------------------------------------------------------------------------------


def refusals(output: str) -> int:
    return sum(line.startswith("error: ") for line in output.splitlines())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"optimizer": {"lrr": 1}}, ["optimizer.lrr", "'lr'"]),
        ({"parallelism": {"sequence_parallel_size": 4}}, ["does not divide the world size 2"]),
        ({"data": {"sources": [{"path": "absent.jsonl"}]}}, ["absent.jsonl"]),
        ({"model": {"vocab_size": 300}}, ["model.vocab_size 300"]),
    ],
)
def test_refusals_end_all_ranks_with_one_message(
    tmp_path: Path, text: Path, cache: Path, overrides: dict[str, Any], parts: list[str]
) -> None:
    code, output = run(forked(2), "--config", write_run(tmp_path, text, cache, **overrides))
    assert code != 0 and refusals(output) == 1, output
    assert 'launch/pretrain.py", line' not in output  # no traceback of ours
    for part in parts:
        assert part in output


def test_a_bad_line_found_while_training_ends_all_ranks(tmp_path: Path, cache: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"no": "text"}\n')
    good_tokenizer = {"train": {"vocab_size": 512, "sources": [{"path": "python-docs:"}]}}
    config = write_run(tmp_path, bad, cache, tokenizer=good_tokenizer)
    code, output = run(forked(2), "--config", config)
    assert code != 0 and refusals(output) == 1, output
    assert "bad.jsonl" in output and "2" in output
