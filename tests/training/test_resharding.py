"""A checkpoint continued by other ranks: the weights, and the steps that follow, against those of
the ranks that wrote it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from fla_dist.config import Config, ZeroConfig
from fla_dist.models import LanguageModel
from fla_dist.parallel.mesh import build_mesh
from fla_dist.training.checkpoint import Checkpoints, TrainingState
from fla_dist.training.distributed import sum_over_ranks
from fla_dist.training.engine import Engine
from fla_dist.training.plan import plan_batches
from tests.models.tiny import tiny_config
from tests.packing import LENGTH, PackedTokens
from tests.parallel.ranks import run_ranks
from tests.training.launching import records, run, torchrun, write_run
from tests.training.test_engine import CPU, MIXED, SETTINGS, batch_of, prepare_rank, weights_of
from tests.training.tiny import tiny_run

ZEROS = {
    "0": ZeroConfig(stage=0),
    "1": ZeroConfig(stage=1),
    "2": ZeroConfig(stage=2),
    "3": ZeroConfig(stage=3, stage3_param_persistence_threshold=40),
}
Outcome = dict[str, Any]


class Run:
    """A model under DeepSpeed on the ranks of this process group, and its checkpoints."""

    def __init__(self, folder: str, zero: str, sequence_parallel_size: int) -> None:
        self.mesh = build_mesh(sequence_parallel_size)
        config = tiny_run(
            tiny_config("samba"),
            sequence_length=LENGTH,
            sequence_parallel_size=sequence_parallel_size,
            zero=ZEROS[zero],
            gradient_accumulation_steps=len(MIXED) // self.mesh.data_parallel_size,
            gradient_clipping=0.1,
            **SETTINGS,
        )
        settings = replace(config.checkpoint, dir=f"{folder}/{zero}", reshard=True)
        self.config: Config = replace(config, checkpoint=settings)
        self.model = LanguageModel(config.model, mesh=self.mesh)
        self.model.initialize(seed=0)
        plan = plan_batches(config, self.mesh.world_size)
        self.engine = Engine(self.model, config, plan, self.mesh, CPU)
        tokenizer = Path(folder) / "tokenizer.json"
        self.checkpoints = Checkpoints(self.config, plan, tokenizer)

    def steps(self, first: int) -> Outcome:
        """Two steps: their losses and gradient norms, and the weights after them."""
        losses, norms = [], []
        for step in (first, first + 1):
            loss, norm = self._step(step)
            losses.append(loss)
            norms.append(norm)
        stage = self.config.deepspeed.zero_optimization.stage
        return {"losses": losses, "norms": norms, "weights": weights_of(self.model, stage)}

    def _step(self, step: int) -> tuple[float, float]:
        mesh, whole = self.mesh, batch_of(MIXED, step)
        valid = float((whole.labels != -100).sum())
        total = 0.0
        for row in range(mesh.data_parallel_rank, len(MIXED), mesh.data_parallel_size):
            fields = (whole.tokens, whole.labels, whole.positions, whole.doc_ids)
            sequence = PackedTokens(*(field[row : row + 1] for field in fields))
            loss = self.engine.loss(sequence.slice(mesh.sequence_parallel_rank, self.sp))
            self.engine.backward(loss, valid)
            result = self.engine.step(SETTINGS["lr"])
            total += loss.item()
        assert result is not None and result.applied
        return sum_over_ranks([total], CPU)[0] / valid, result.grad_norm

    @property
    def sp(self) -> int:
        return self.mesh.sequence_parallel_size


def write(folder: str, zeros: list[str]) -> dict[str, Outcome]:
    prepare_rank()
    outcomes = {}
    for zero in zeros:
        run = Run(folder, zero, 2)
        run.steps(0)
        run.checkpoints.save(run.engine, TrainingState(step=2, tokens=99))
        outcomes[zero] = run.steps(2)
        run.engine.deepspeed.destroy()
    return outcomes


def go_on(folder: str, zeros: list[str], sequence_parallel_size: int) -> dict[str, Outcome]:
    prepare_rank()
    outcomes = {}
    for zero in zeros:
        run = Run(folder, zero, sequence_parallel_size)
        state = run.checkpoints.restore(run.engine)
        assert state is not None and (state.step, state.tokens) == (2, 99)
        outcomes[zero] = run.steps(2)
        assert not list(run.checkpoints.dir.glob("*universal*"))
        run.engine.deepspeed.destroy()
    return outcomes


def check(folder: Path, zeros: list[str], meshes: list[tuple[int, int]]) -> None:
    (folder / "tokenizer.json").write_text("{}")
    expected = run_ranks(2, write, str(folder), zeros)[0]
    for world_size, sequence_parallel_size in meshes:
        for got in run_ranks(world_size, go_on, str(folder), zeros, sequence_parallel_size):
            for zero, outcome in got.items():
                for key in ("losses", "norms"):
                    assert outcome[key] == pytest.approx(expected[zero][key], rel=2e-5), zero
                for name, weight in outcome["weights"].items():
                    error = (weight - expected[zero]["weights"][name]).abs().max().item()
                    assert error <= 2e-5 * SETTINGS["lr"], (zero, name)


def test_more_ranks_and_a_larger_sequence_parallel_size(tmp_path: Path) -> None:
    check(tmp_path, ["2", "3"], [(4, 4)])


@pytest.mark.slow
def test_every_stage_and_mesh(tmp_path: Path) -> None:
    check(tmp_path, list(ZEROS), [(1, 1), (2, 1), (4, 2), (4, 4)])


@pytest.mark.slow
def test_a_whole_run_goes_on_with_the_same_samples_on_other_ranks(tmp_path: Path) -> None:
    """Two ranks that share each sequence, then one rank alone: the same losses step by step. Then
    a second stage of longer sequences, on one rank and on four."""
    text = tmp_path / "lines.jsonl"
    documents = [topics[name] for name in sorted(topics) if len(topics[name]) < 4000][:40]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    folder = tmp_path / "run"
    config = write_run(folder, text, tmp_path / "cache", training={"max_steps": 6})
    code, output = run(torchrun(2), "--config", config)
    assert code == 0, output
    expected = {r["step"]: r for r in records(folder)}
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    arguments = ("--config", str(config), "--parallelism.sequence_parallel_size", "1")
    code, output = run(torchrun(1), *arguments)
    assert code != 0 and "checkpoint.reshard true continues it" in output
    code, output = run(torchrun(1), *arguments, "--checkpoint.reshard", "true")
    assert code == 0, output
    again = records(folder)[6:]
    assert [record["step"] for record in again] == [4, 5, 6]
    compare(again, expected)
    # Longer sequences at once, of which four ranks get different numbers of tokens.
    arguments = (
        "--config", str(config), "--checkpoint.reshard", "true", "--training.max_steps", "8",
        "--data.sequence_length", "130", "--training.global_batch_tokens", "520",
    )  # fmt: skip
    for ranks in (1, 4):
        parallel = ("--parallelism.sequence_parallel_size", str(ranks))
        code, output = run(torchrun(ranks), *arguments, *parallel)
        assert code == 0, output
        shutil.rmtree(folder / "checkpoints" / "step_00000008")
    longer = records(folder)[9:]
    assert [record["step"] for record in longer] == [7, 8, 7, 8]
    assert longer[0]["tokens"] == again[-1]["tokens"] + 520
    compare(longer[2:], {record["step"]: record for record in longer[:2]})


def compare(got: list[dict[str, Any]], expected: dict[int, dict[str, Any]]) -> None:
    for record in got:
        for key in ("loss", "grad_norm", "tokens", "lr"):
            assert record[key] == pytest.approx(expected[record["step"]][key], rel=2e-5), key
