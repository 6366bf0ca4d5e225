"""Retention and linear attention are settings of simple GLA."""

import math

import pytest
import torch

from fla_dist.kernels.retention import linear_attention, retention, retention_decay
from fla_dist.kernels.simple_gla import simple_gla


def test_settings_of_simple_gla():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 3, 8, dtype=torch.float64) for _ in range(3))
    decay = retention_decay(3).double()
    token_decay = decay.expand(2, 40, 3)
    for given, expected in (
        (retention(q, k, v, decay), simple_gla(q, k, v, token_decay)),
        (linear_attention(q, k, v), simple_gla(q, k, v, torch.zeros_like(token_decay))),
    ):
        for x, y in zip(given, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_decays_are_the_paper_s():
    assert retention_decay(2).exp().tolist() == pytest.approx([1 - 1 / 32, 1 - 1 / 64])
    assert math.isfinite(retention_decay(64)[-1].item())


def test_bad_decay_names_the_argument():
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="log_decay"):
        retention(q, q, q, torch.zeros(3))
