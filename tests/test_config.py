"""The strict loader: what it accepts, and what each refusal says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fla_dist.config import ConfigError, config_from_dict, config_to_dict, load_config
from fla_dist.models.mixers.mamba import MambaConfig
from fla_dist.training.optimizer import learning_rate
from fla_dist.training.plan import plan_batches

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.json"))
TINY = Path(__file__).parent.parent / "configs" / "samba_tiny.json"


def refusal(*overrides: str, path: Path = TINY) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_round_trip(path: Path) -> None:
    config = load_config(path)
    assert config_from_dict(config_to_dict(config)) == config


def test_values_reach_their_dataclasses() -> None:
    config = load_config(TINY, ["--optimizer.lr", "2e-4", "--model.mixers.mamba.state_size=8"])
    assert config.optimizer.lr == 2e-4
    assert config.model.mixers["mamba"] == MambaConfig(state_size=8)
    assert config.optimizer.betas == (0.9, 0.95)


def test_a_mixer_without_settings_gets_its_defaults() -> None:
    config = load_config(TINY, ["--model.layer_pattern", '["mamba"]', "--model.mixers", "{}"])
    assert config.model.mixers == {"mamba": MambaConfig()}


def test_overrides_reach_into_lists() -> None:
    config = load_config(TINY, ["--data.sources.0.weight", "2"])
    assert config.data.sources[0].weight == 2.0


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys, with the nearest known one
        (["--optimizer.lrr", "1"], ["optimizer.lrr: unknown key", "'lr'"]),
        (["--trainin.seed", "1"], ["trainin: unknown key", "'training'"]),
        (["--model.mixers.mamba.state_siz", "1"], ["model.mixers.mamba.state_siz", "'state_size'"]),
        (["--deepspeed.gradient_cliping", "1"], ["deepspeed.gradient_cliping", "clipping"]),
        (["--deepspeed.zero_optimization.stag", "1"], ["zero_optimization.stag", "'stage'"]),
        (["--model.layer_pattern", '["mambo"]'], ["model.layer_pattern", "'mambo'", "'mamba'"]),
        # wrong types and ranges, with what is allowed
        (["--optimizer.lr", "fast"], ["optimizer.lr", '"fast"', "a number > 0"]),
        (["--optimizer.lr", "-1"], ["optimizer.lr: -1", "a number > 0"]),
        (["--optimizer.betas", "[0.9]"], ["optimizer.betas", "[0.9]", "a list of 2"]),
        (["--optimizer.betas", "[0.9, 2]"], ["optimizer.betas", "<= 1"]),
        (["--training.seed", "true"], ["training.seed: true", "an integer >= 0"]),
        (["--training.max_steps", "2.5"], ["training.max_steps: 2.5", "an integer >= 1"]),
        (["--data.packing", "docs"], ["data.packing", '"documents" | "none"']),
        (["--data.sources", "5"], ["data.sources: 5", "a list"]),
        (["--data.sources.0.weight", "0"], ["data.sources.0.weight: 0", "> 0"]),
        (["--deepspeed.zero_optimization.stage", "4"], ["stage: 4", ">= 0 and <= 3"]),
        (["--model.tie_word_embeddings", "1"], ["tie_word_embeddings: 1", "true or false"]),
        (["--checkpoint.dir", "null"], ["checkpoint.dir: null", "a string"]),
        (["--logging", "3"], ["logging", "an object", "3"]),
        # one quantity in two places
        (["--deepspeed.train_batch_size", "8"], ["train_batch_size", "global_batch_tokens"]),
        (["--deepspeed.optimizer", "{}"], ["deepspeed.optimizer", "section optimizer"]),
        (["--deepspeed.bf16", "{}"], ["deepspeed.bf16", "torch_autocast"]),
        (["--deepspeed.sequence_parallel_size", "2"], ["parallelism.sequence_parallel_size"]),
        (
            ["--deepspeed.gradient_accumulation_steps", "2"],
            ["gradient_accumulation_steps", "global_batch_tokens", "same quantity"],
        ),
        (["--training.max_tokens", "100"], ["training: set exactly one of", "max_steps"]),
        (["--lr_scheduler.warmup_ratio", "0.1"], ["lr_scheduler: warmup_ratio", "keep one"]),
        (["--tokenizer.path", "x"], ["tokenizer: set exactly one of path and train"]),
        # what cannot go together
        (["--data.sequence_length", "1"], ["data.sequence_length: 1", "2 ranks"]),
        (["--evaluation.sequence_lengths", "[1]"], ["evaluation.sequence_lengths: 1"]),
        (["--data.validation_sources", "[]"], ["evaluation", "data.validation_sources"]),
        (["--model.vocab_size", "300"], ["tokenizer.train.vocab_size", "model.vocab_size 300"]),
        (
            ["--model.mixers.sliding_window_attention.num_heads", "5"],
            ["model.mixers.sliding_window_attention.num_heads: 5"],
        ),
        (
            ["--training.compile", "true", "--deepspeed.zero_optimization.stage", "3"],
            ["training.compile: true", "stage 3", "expected false or auto"],
        ),
        # the command line itself
        (["optimizer.lr", "1"], ["expected --section.key value"]),
        (["--optimizer.lr"], ["--optimizer.lr has no value"]),
        (["--data.sources.7.weight", "1"], ["'7' is not an index below 2"]),
    ],
)
def test_refusals_name_the_key_the_value_and_what_is_allowed(
    override: list[str], parts: list[str]
) -> None:
    message = refusal(*override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{\n "model": {},\n "data" 3\n}', ["run.json:3:", "not JSON"]),
        ('{"model": {}, "model": {}}', ["model: set twice"]),
        ("[]", ["expected an object"]),
        ('{"optimizer": {"lr": NaN}}', ["optimizer.lr: NaN", "a number > 0"]),
        ("{}", ["model: missing"]),
    ],
)
def test_refusals_of_the_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    message = refusal(path=path)
    for part in parts:
        assert part in message


def test_the_second_stage_goes_on_where_the_first_ends() -> None:
    first, second = (load_config(TINY.with_name(f"samba_staged_{n}.json")) for n in ("4k", "32k"))
    for section in ("model", "tokenizer", "optimizer", "parallelism"):
        assert getattr(first, section) == getattr(second, section)
    assert first.data == replace(second.data, sequence_length=4096)
    assert first.checkpoint.dir == second.checkpoint.dir
    assert second.checkpoint.resume == "required"
    plans = [plan_batches(config, 8) for config in (first, second)]
    assert plans[0].tokens_per_step == plans[1].tokens_per_step
    end = plans[0].total_steps
    rates = [
        learning_rate(step, plan.total_steps, config.optimizer.lr, config.lr_scheduler)
        for config, plan, step in zip((first, second), plans, (end - 1, end), strict=True)
    ]
    assert rates[1] == pytest.approx(rates[0], rel=0.01)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    assert "absent.json" in refusal(path=tmp_path / "absent.json")


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    tree: dict[str, Any] = json.loads(TINY.read_text())
    del tree["optimizer"]["lr"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tree))
    assert "optimizer.lr: missing; expected a number > 0" in refusal(path=path)


def test_batch_arithmetic() -> None:
    plan = plan_batches(load_config(TINY, ["--training.global_batch_tokens", "8192"]), 4)
    assert (plan.data_parallel_size, plan.sequence_parallel_size) == (2, 2)
    assert plan.gradient_accumulation_steps * plan.micro_batch_size * 2 * 512 == 8192
    assert plan.sequences_per_step == 16


@pytest.mark.parametrize(
    ("world_size", "overrides", "parts"),
    [
        (3, [], ["sequence_parallel_size: 2 does not divide the world size 3"]),
        (
            2,
            ["--training.global_batch_tokens", "4097"],
            ["training.global_batch_tokens: 4097 is not a multiple of 2048"],
        ),
    ],
)
def test_batch_arithmetic_that_does_not_come_out(
    world_size: int, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_batches(load_config(TINY, overrides), world_size)
    for part in parts:
        assert part in str(error.value)
