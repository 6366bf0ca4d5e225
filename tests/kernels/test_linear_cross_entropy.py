from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.linear_cross_entropy import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    logits = hidden @ weight.t()
    squared = logits.logsumexp(dim=1).square() * (labels != -100)
    return F.cross_entropy(logits, labels, reduction="sum") + z_loss * squared.sum()


@pytest.mark.parametrize("chunks", [None, 1, 3, 11, 50])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_plain_loss(chunks: int | None, z_loss: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (11,))
    labels[[0, 4, 10]] = -100
    outcomes = []
    for loss in (
        linear_cross_entropy(hidden, weight, labels, z_loss=z_loss, chunks=chunks),
        plain(hidden, weight, labels, z_loss),
    ):
        outcomes.append([loss, *torch.autograd.grad(0.3 * loss, (hidden, weight))])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_no_label_counts() -> None:
    hidden = torch.randn(4, 5, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(7, 5), torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = Tensor.logsumexp

    def watched(self: Tensor, *args, **kwargs) -> Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "logsumexp", watched)
    linear_cross_entropy(torch.randn(64, 4), torch.randn(9, 4), torch.zeros(64).long(), chunks=8)
    assert largest == 8 * 9


def test_labels_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected \(4,\)"):
        linear_cross_entropy(torch.zeros(4, 5), torch.zeros(7, 5), torch.zeros(3).long())
