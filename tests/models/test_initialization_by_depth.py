"""What mixers initialize by their layer."""

from __future__ import annotations

import pytest
import torch

from fla_dist.models import LanguageModel
from tests.models.tiny import tiny_config


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_lower_bounds_of_forget_gates_rise_with_depth(name: str) -> None:
    config = tiny_config("hgrn", layer_pattern=(name,), num_hidden_layers=4)
    model = LanguageModel(config)
    model.initialize(seed=0)
    least, most = torch.full((1, 16), -1e4), torch.full((1, 16), 1e4)
    for index, block in enumerate(model.blocks):
        gate = block.mixer.forget_gate
        bound = torch.full((1, 16), (index + 0.5) / 4)
        torch.testing.assert_close(gate(least).exp(), bound)
        torch.testing.assert_close(gate(most), torch.zeros(1, 16))


def test_rwkv6_layers_differ_as_their_paper_says() -> None:
    model = LanguageModel(tiny_config("rwkv6", layer_pattern=("rwkv6",), num_hidden_layers=3))
    model.initialize(seed=0)
    first, second, third = (block.mixer for block in model.blocks)
    for mixer in (first, second, third):
        assert mixer.decay_bias[0] == -6 and mixer.decay_bias[-1] == -1
    assert (first.decay_bias > third.decay_bias)[1:-1].all()
    assert (second.shift_input[1:] > third.shift_input[1:]).all()
    torch.testing.assert_close(first.bonus[:3], torch.tensor([0.0, 0.1, -0.1]))
    torch.testing.assert_close(third.bonus[0], torch.tensor(1.0))
