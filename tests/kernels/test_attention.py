from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fla_dist.kernels.attention import attention, attention_mask, reference
from fla_dist.kernels.attention.mask import block_mask
from tests.packing import positions_of


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    context = k.shape[1] - q.shape[1]
    return attention(q, k, v, attention_mask(positions, context=context, window=window))


@pytest.mark.parametrize("starts", [[0, 5, 13], [0]])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("context", [0, 3, 17])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_dense(
    starts: list[int],
    window: int | None,
    context: int,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK", 8)
    torch.manual_seed(0)
    q = torch.randn(2, 21, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, context + 21, kv_heads, 6, dtype=torch.float64, requires_grad=True)
        for _ in "kv"
    )
    positions = torch.stack([positions_of(starts, 21), positions_of([0], 21)])
    positions[1] += context
    outcomes = []
    for function in (attend, reference.attention_dense):
        output = function(q, k, v, positions, window)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), (q, k, v))])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_single_document_is_plain_causal() -> None:
    whole, packed = torch.arange(9)[None], positions_of([0, 4], 9)[None]
    assert attention_mask(whole, window=None).causal
    assert attention_mask(whole, window=9).causal
    assert not attention_mask(whole, window=8).causal
    assert not attention_mask(whole, context=2, window=None).causal
    assert attention_mask(whole + 2, context=2, window=None).causal
    assert not attention_mask(packed, window=None).causal


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize(("length", "context"), [(512, 0), (512, 127), (700, 128), (300, 299)])
def test_blocks_cover_what_is_seen(length: int, context: int, window: int | None) -> None:
    """FlexAttention's plain form under the mask and its list of blocks equals the formula, and a
    block is listed only where some query sees a key of it."""
    torch.manual_seed(0)
    positions = torch.stack([positions_of([0, 5, 130, 256, 301 % length], length)] * 2)
    positions[1] = torch.arange(length) + context // 2
    first = attention_mask(positions, context=context, window=window).first
    mask = block_mask(first, context)
    key = torch.arange(-context, length)
    seen = (key >= first[..., None]) & (key <= torch.arange(length)[:, None])  # [B, T, L + T]
    rows, columns = -(-length // 128), -(-(context + length) // 128)
    padded = torch.zeros(2, rows * 128, columns * 128, dtype=torch.bool)
    padded[:, :length, : context + length] = seen
    blocks = padded.unflatten(1, (rows, 128)).unflatten(3, (columns, 128))
    some = blocks.any(dim=4).any(dim=2)
    assert torch.equal(mask.to_dense()[:, 0].bool(), some)
    full = torch.zeros(2, rows, columns + 1, dtype=torch.bool)
    listed = torch.arange(columns) < mask.full_kv_num_blocks[:, 0, :, None]
    full.scatter_(2, mask.full_kv_indices[:, 0].long().masked_fill(~listed, columns), True)
    assert not (full[:, :, :columns] & ~blocks.all(dim=4).all(dim=2))[:, :-1].any()

    q, k, v = (torch.randn(2, 2, n, 16) for n in (length, *[context + length] * 2))
    got = flex_attention(q, k, v, block_mask=mask).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = reference.attention_dense(q, k, v, positions, window)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_hidden_keys_have_no_influence() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 10, 2, 4) for _ in "qkv")
    positions = positions_of([0, 6], 10)[None]
    before = attend(q, k, v, positions, 3)
    k[:, :4], v[:, :4] = 9, 9  # before the window of token 7, and of another document
    after = attend(q, k, v, positions, 3)
    assert torch.equal(before[:, 6:], after[:, 6:]) and not torch.equal(before, after)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize(
    ("length", "context", "kv_heads", "window", "starts", "open_before"),
    [
        (2100, 0, 2, None, [0], 0),
        (2100, 0, 1, None, [0], 0),
        (2100, 0, 1, None, [0, 5, 700, 701, 1500], 0),
        (2100, 0, 2, 1024, [0], 0),
        (2100, 0, 2, 1024, [0, 5, 700, 701], 0),
        (2100, 1023, 2, 1024, [0, 700], 0),
        (2100, 1023, 2, 1024, [300], 5000),
        (1024, 2048, 2, None, [100, 900], 2048),
        (1024, 2048, 2, None, [1023], 2048),
        (100, 63, 2, 64, [0, 50], 0),
    ],
)
def test_gpu_equals_fp64(
    length: int,
    context: int,
    kv_heads: int,
    window: int | None,
    starts: list[int],
    open_before: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    torch.manual_seed(0)
    positions = positions_of(starts, length)[None]
    positions[:, : min(starts)] += open_before
    positions = positions.cuda()
    q, do = (torch.randn(1, length, 2, 64, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (
        torch.randn(1, context + length, kv_heads, 64, device="cuda", dtype=dtype) for _ in "kv"
    )
    outcomes = []
    for function, wide in ((attend, dtype), (reference.attention_dense, torch.float64)):
        inputs = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
        output = function(*inputs, positions, window)
        outcomes.append([output, *torch.autograd.grad(output, inputs, do.to(wide))])
    for got, expected in zip(*outcomes, strict=True):
        assert (got.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(heads=3, kv_heads=2), "q has 3 heads, expected a multiple of the 2 of k"),
        (dict(window=0), "window is 0, expected at least 1"),
        (dict(keys=4), r"k has shape \(1, 4, 2, 4\), expected \(1, 5, 2, 4\)"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    heads, kv_heads = arguments.get("heads", 2), arguments.get("kv_heads", 2)
    q = torch.zeros(1, 5, heads, 4)
    k = torch.zeros(1, arguments.get("keys", 5), kv_heads, 4)
    positions = positions_of([0], 5)[None]
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, attention_mask(positions, window=arguments.get("window", 2)))
