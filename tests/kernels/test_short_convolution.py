from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fla_dist.kernels.short_convolution import short_convolution
from tests.packing import positions_of


def test_equals_torch_convolution_on_one_document() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 9, 3), (3, 4), (3,)))
    left = torch.randn(2, 3, 3, dtype=torch.float64)
    positions = torch.arange(20, 29).expand(2, -1)
    got = short_convolution(x, weight, bias, left_context=left, positions=positions)
    channels_first = torch.cat([left, x], dim=1).transpose(1, 2)
    expected = F.conv1d(channels_first, weight[:, None], bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_documents_do_not_see_each_other(width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 12, 3), torch.randn(3, width)
    left = torch.randn(1, width - 1, 3)
    positions = positions_of([0, 5, 6], 12)[None]
    packed = short_convolution(x, weight, None, left_context=left, positions=positions)
    zeros = torch.zeros(1, width - 1, 3)
    parts = [
        short_convolution(
            x[:, a:b], weight, None, left_context=zeros, positions=torch.arange(b - a)[None]
        )
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def test_wrong_context() -> None:
    x = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match=r"left_context has shape \(1, 2, 3\), expected \(1, 3"):
        short_convolution(
            x,
            torch.zeros(3, 4),
            None,
            left_context=torch.zeros(1, 2, 3),
            positions=torch.arange(5)[None],
        )
