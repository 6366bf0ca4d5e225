from __future__ import annotations

import pytest
import torch

from fla_dist.kernels.attention import attention, reference
from tests.packing import positions_of


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("context", [0, 3, 17])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocked_equals_dense(
    window: int | None, context: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK", 8)
    torch.manual_seed(0)
    q = torch.randn(2, 21, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, context + 21, kv_heads, 6, dtype=torch.float64, requires_grad=True)
        for _ in "kv"
    )
    positions = torch.stack([positions_of([0, 5, 13], 21), positions_of([0], 21)])
    positions[1] += context
    outcomes = []
    for function in (attention, reference.attention_dense):
        output = function(q, k, v, positions=positions, window=window)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), (q, k, v))])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_hidden_keys_have_no_influence() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 10, 2, 4) for _ in "qkv")
    positions = positions_of([0, 6], 10)[None]
    before = attention(q, k, v, positions=positions, window=3)
    k[:, :4], v[:, :4] = 9, 9  # before the window of token 7, and of another document
    after = attention(q, k, v, positions=positions, window=3)
    assert torch.equal(before[:, 6:], after[:, 6:]) and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(heads=3, kv_heads=2), "q has 3 heads, expected a multiple of the 2 of k"),
        (dict(window=0), "window is 0, expected at least 1"),
        (dict(keys=4), "k has 4 tokens, expected at least the 5 of q"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    heads, kv_heads = arguments.get("heads", 2), arguments.get("kv_heads", 2)
    q = torch.zeros(1, 5, heads, 4)
    k = torch.zeros(1, arguments.get("keys", 5), kv_heads, 4)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, positions=positions_of([0], 5)[None], window=arguments.get("window", 2))
