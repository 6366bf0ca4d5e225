"""A chunk's losses and the gradient of its logits in plain PyTorch: the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def token_losses_reference(
    logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The losses of a chunk's tokens from their logits [c, W], in fp32 or more, and the gradient of
    their sum by the logits, in the logits' dtype; the logits themselves where no `gradient`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = (labels != IGNORED).to(wide.dtype)
    if weights is not None:
        counts = counts * weights
    target = labels.clamp(min=0).unsqueeze(1)
    normalizer = wide.logsumexp(dim=1)
    losses = normalizer - wide.gather(1, target).squeeze(1) + z_loss * normalizer.square()
    if not gradient:
        return losses * counts, logits
    softmax = (wide - normalizer[:, None]).exp()
    by_logits = softmax * (1 + 2 * z_loss * normalizer)[:, None]
    by_logits.scatter_add_(1, target, -torch.ones_like(target, dtype=wide.dtype))
    return losses * counts, (by_logits * counts[:, None]).to(logits.dtype)
