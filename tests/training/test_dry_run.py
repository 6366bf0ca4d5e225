"""--dry-run: arithmetic that can be checked by hand."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from fla_dist.config import Config, ConfigError, load_config
from fla_dist.models import LanguageModel
from fla_dist.parallel.cost import Cost, Link, Links
from fla_dist.training.dry_run import describe_run, exchange_costs
from fla_dist.training.plan import plan_batches
from launch.pretrain import main

SAMBA_32K = "configs/samba_32k.json"


def test_samba_1_3b_has_the_published_size() -> None:
    text = describe_run(load_config(SAMBA_32K), 8)
    lines = dict(line.rsplit("  ", 1) for line in text.splitlines())
    lines = {name.strip(): value for name, value in lines.items()}
    assert lines["parameters"] == "1,330,207,488"
    assert lines["gradient accumulation steps"] == "32"
    assert lines["tokens a rank and micro batch"] == "1 x 8,192"
    assert lines["tokens a step"] == "2,097,152"


def test_a_world_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel_size: 4 does not divide"):
        describe_run(load_config(SAMBA_32K), 6)


def costs_of(config: Config, world_size: int, ranks_per_host: int = 8) -> dict[str, Cost]:
    with torch.device("meta"):
        model = LanguageModel(config.model)
    links = Links(host=Link(1.0, 1e6), hosts=Link(100.0, 1e3))
    plan = plan_batches(config, world_size)
    return exchange_costs(config, plan, model, ranks_per_host, links)


def test_exchange_of_samba_by_hand() -> None:
    """9 Mamba layers of 4608 x 16 numbers and 9 windows of 2048; 32 micro batches."""
    costs = costs_of(load_config(SAMBA_32K), 8)
    state, decay = 4 * 4608 * 16, 4 * 4608
    states = 32 * 9 * 3 * (2 * state + decay)  # 3 other ranks; the reverse sends no decay
    assert costs["states"].received_bytes == states
    assert costs["states"].seconds == pytest.approx(32 * 9 * 2 + states / 1e6)
    # bf16; 2047 keys and values, and one more for whole blocks
    window, convolution = 2 * 2048 * 2 * 2304, 2 * 3 * 4608
    halos = 32 * 9 * 2 * (window + convolution)
    assert costs["halos"].received_bytes == halos
    assert costs["halos"].seconds == pytest.approx(32 * 9 * 2 * 2 + halos / 1e6)


def test_hosts_pass_an_eighth_each() -> None:
    config = load_config(SAMBA_32K, ["--parallelism.sequence_parallel_size", "16"])
    forward, backward = 4 * 4608 * 17, 4 * 4608 * 16
    a_layer = (forward + backward) * (2 * 7 / 8 + 1 / 8)
    costs = costs_of(config, 16)
    micro_batches = plan_batches(config, 16).gradient_accumulation_steps
    assert costs["states"].received_bytes == micro_batches * 9 * a_layer
    seconds = 2 * (2 + 100) + (forward + backward) * (2 * 7 / 8 / 1e6 + 1 / 8 / 1e3)
    assert costs["states"].seconds == pytest.approx(micro_batches * 9 * seconds)


def test_an_exchange_of_a_tenth_of_the_step_is_warned_of() -> None:
    arguments = ["--data.sequence_length", "16384", "--parallelism.sequence_parallel_size", "8"]
    config = load_config(SAMBA_32K, arguments)
    slow = Links(host=Link(1e-5, 1e9))
    assert "the exchange is" in describe_run(config, 8, links=slow)
    assert "the exchange is" not in describe_run(config, 8)
    alone = load_config(SAMBA_32K, ["--parallelism.sequence_parallel_size", "1"])
    assert "exchange" not in describe_run(alone, 8)


def test_the_command_warns(tmp_path, monkeypatch, capsys) -> None:
    links = tmp_path / "links.json"
    links.write_text('{"links": {"host": {"alpha_seconds": 1e-5, "bytes_per_second": 1e9}}}')
    words = ["--dry-run", "--world-size", "8", "--links", str(links)]
    words += ["--data.sequence_length", "16385", "--parallelism.sequence_parallel_size", "8"]
    words += ["--training.global_batch_tokens", "16385", "--model.num_hidden_layers", "2"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", SAMBA_32K, *words])
    assert main() == 0
    said = capsys.readouterr().out
    assert "the exchange is" in said
    assert re.search(r"tokens a rank and micro batch +1 x 2,049\n", said)


def test_an_exchange_that_hosts_do_not_allow_is_refused() -> None:
    config = load_config(SAMBA_32K, ["--parallelism.state_exchange", "hierarchical"])
    with pytest.raises(ConfigError, match="state_exchange is 'hierarchical', expected"):
        describe_run(config, 8)
