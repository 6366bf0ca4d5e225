"""The model on a GPU in bf16 autocast against the CPU in fp64: loss and gradients."""

from __future__ import annotations

import pytest
import torch

from fla_dist.models import LanguageModel
from tests.models.tiny import PATTERNS, tiny_config
from tests.packing import STARTS, PackedTokens, packed_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on(device: str, batch: PackedTokens) -> PackedTokens:
    fields = (batch.tokens, batch.labels, batch.positions, batch.doc_ids)
    return PackedTokens(*(x.to(device) for x in fields))


def loss_and_gradient(
    pattern: str, device: str, dtype: torch.dtype, autocast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    config = tiny_config(pattern, hidden_size=64, intermediate_size=128)
    model = LanguageModel(config)
    model.initialize(seed=0)
    model.to(device, dtype)
    batch = on(device, packed_tokens(list(STARTS.values()), 37))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        loss = model(batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return loss.detach().double().cpu(), gradient.double().cpu()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("autocast", "loss_bound", "gradient_bound"), [(False, 1e-5, 1e-4), (True, 1e-3, 2e-2)]
)
def test_gpu_equals_fp64(
    pattern: str, autocast: bool, loss_bound: float, gradient_bound: float
) -> None:
    """fp32 runs with the tf32 matrix products off; a bf16 gradient is rounded at every layer."""
    expected_loss, expected = loss_and_gradient(pattern, "cpu", torch.float64, False)
    loss, gradient = loss_and_gradient(pattern, "cuda", torch.float32, autocast)
    assert abs(loss - expected_loss) <= loss_bound * expected_loss
    assert (gradient - expected).norm() <= gradient_bound * expected.norm()
