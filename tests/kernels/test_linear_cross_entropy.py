from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.linear_cross_entropy import linear_cross_entropy
from fla_dist.kernels.linear_cross_entropy.reference import token_losses_reference
from fla_dist.kernels.linear_cross_entropy.triton_kernels import token_losses
from tests.kernels.interpreter import interpreted, run_interpreted


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, w: Tensor, z_loss: float) -> Tensor:
    logits = hidden @ weight.t()
    squared = logits.logsumexp(dim=1).square() * (labels != -100)
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * squared
    return (w * losses).sum()


@pytest.mark.parametrize("chunks", [None, 1, 3, 11, 50])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_loss(chunks: int | None, z_loss: float, weighted: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (11,))
    labels[[0, 4, 10]] = -100
    w = torch.rand(11, dtype=torch.float64) if weighted else torch.ones(11, dtype=torch.float64)
    options = {"token_weights": w} if weighted else {}
    outcomes = []
    for loss in (
        linear_cross_entropy(hidden, weight, labels, z_loss=z_loss, chunks=chunks, **options),
        plain(hidden, weight, labels, w, z_loss),
    ):
        outcomes.append([loss, *torch.autograd.grad(0.3 * loss, (hidden, weight))])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_no_label_counts() -> None:
    hidden = torch.randn(4, 5, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(7, 5), torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtype() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, requires_grad=True)
    weight = torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(30, (40,))
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(exact, (hidden, weight)),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 2e-2 * expected.norm()


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


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [37, 4096, 9000])
def test_kernel_equals_reference(width: int, weighted: bool) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(6, width)
    logits[1] -= 200  # exp of it alone underflows
    logits[2, 5] = -torch.inf
    labels = torch.tensor([3, 0, width - 1, -100, 7, -100])
    weights = torch.rand(6) if weighted else None
    expected, expected_gradient = token_losses_reference(logits, labels, weights, 0.01, True)
    kept = logits.clone()
    losses = token_losses(kept, labels, weights, 0.01, False)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(token_losses(kept, labels, weights, 0.01, True), losses)
    torch.testing.assert_close(kept, expected_gradient, rtol=1e-5, atol=1e-6)
