"""Attention to stretches of keys: their documents as flash attention is told of them, and its
results on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.attention.reference import attention_dense
from fla_dist.kernels.attention.stretch import (
    attend,
    attend_backward,
    document_segments,
    join,
    stretch,
)
from tests.packing import positions_of

CASES = {
    "one document": [([0], 0), ([0], 0)],
    "from before": [([0], 90), ([0], 5)],
    "several": [([0, 3, 20], 4), ([7, 11], 200)],
    "all seen": [([0], 300), ([0], 300)],
    "starts with the slice": [([0, 21], 0), ([21], 31)],
}


def positions_with(case: str, length: int) -> Tensor:
    """[2, length]: where documents start, and how many tokens the first one had before."""
    rows = []
    for starts, before in CASES[case]:
        row = positions_of(starts, length)
        row[: min([start for start in starts if start > 0], default=length)] += before
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("start", "count"), [(-30, 10), (-10, 10), (-40, 39), (0, 22)])
def test_segments_say_who_sees_whom(case: str, start: int, count: int) -> None:
    length = 22
    positions = positions_with(case, length)
    query = torch.arange(length)[:, None]
    key = torch.arange(start, start + count)
    expected = (key <= query) & (key >= (query - positions[..., None]))  # [2, T, count]
    queries, keys = document_segments(positions, start, count)
    assert queries[0] == keys[0] == 0
    assert queries[-1] == 2 * length and keys[-1] == 2 * count
    seen = torch.zeros(2 * length, 2 * count, dtype=torch.bool)
    for q, q_end, k, k_end in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        block = torch.ones(q_end - q, k_end - k, dtype=torch.bool)
        if start == 0:
            block = block.tril()
        seen[q:q_end, k:k_end] = block
    assert torch.equal(seen.view(2, length, 2, count)[[0, 1], :, [0, 1]], expected)
    assert seen.sum() == expected.sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "stretches", [[(-300, 300), (0, 400)], [(-300, 50), (-250, 250), (0, 400)]]
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gpu_equals_fp64(
    kv_heads: int, stretches: list[tuple[int, int]], case: str, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    length, context = 400, 300
    positions = positions_with(case, length).clamp(max=length + context - 1)
    positions = torch.minimum(positions, torch.arange(length) + context).cuda()
    q, do = (torch.randn(2, length, 4, 64, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (
        torch.randn(2, context + length, kv_heads, 64, device="cuda", dtype=dtype) for _ in "kv"
    )
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected_o = attention_dense(*exact, positions, None)
    expected = [expected_o, *torch.autograd.grad(expected_o, exact, do.double())]

    whole, parts = None, []
    for start, count in stretches:
        place = slice(start + context, start + context + count)
        part = stretch(positions, start, count)
        assert part.segments is not None
        parts.append((place, part))
        o, lse = attend(q, k[:, place], v[:, place], part)
        whole = (o.float(), lse) if whole is None else join(*whole, o.float(), lse)
    assert whole is not None
    o, lse = whole
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for place, part in parts:
        inputs = (q, k[:, place], v[:, place], o.to(dtype), lse, do)
        gradients = attend_backward(*inputs, part)
        dq += gradients[0]
        dk[:, place] += gradients[1]
        dv[:, place] += gradients[2]
    for got, truth in zip((o, dq, dk, dv), expected, strict=True):
        assert (got.double() - truth).norm() <= bound * truth.norm()
