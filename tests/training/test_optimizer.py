"""The learning rate by step, and which parameters decay."""

from __future__ import annotations

import pytest

from fla_dist.config import LRSchedulerConfig
from fla_dist.models import LanguageModel
from fla_dist.training.optimizer import learning_rate, parameter_groups
from tests.models.tiny import tiny_config

STEPS = 100


def curve(**settings) -> list[float]:
    config = LRSchedulerConfig(**settings)
    return [learning_rate(step, STEPS, 2.0, config) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_is_a_line_to_the_peak(kind: str) -> None:
    assert curve(type=kind, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert curve(type=kind, warmup_ratio=0.04)[:4] == [0.5, 1.0, 1.5, 2.0]


def test_cosine_ends_at_the_floor() -> None:
    rates = curve(type="cosine", warmup_steps=4, min_lr_ratio=0.1)
    assert rates[4] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert rates[4 + 95 // 2] == pytest.approx(1.1, abs=0.02)


def test_wsd_is_stable_then_a_line_to_the_floor() -> None:
    rates = curve(type="wsd", warmup_steps=4, decay_ratio=0.2, min_lr_ratio=0.0)
    assert set(rates[4:80]) == {2.0}
    assert rates[80:] == pytest.approx([2.0 * (19 - i) / 20 for i in range(20)])


def test_constant_stays() -> None:
    assert set(curve(type="constant")) == {2.0}


def test_decay_on_matrices_only() -> None:
    model = LanguageModel(tiny_config("all"))
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {id(p) for p in [*decayed, *others]} == set(names)
    assert all(p.ndim >= 2 for p in decayed)
    assert {"A_log", "D", "time_step_bias"} <= {names[id(p)].rsplit(".")[-1] for p in others}
    assert "embedding.weight" in {names[id(p)] for p in decayed}
