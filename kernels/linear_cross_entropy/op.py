"""The language model's head and its loss, chunk by chunk: no [T, vocabulary] tensor in whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.launch import capability
from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.linear_cross_entropy.reference import token_losses_reference
from fla_dist.kernels.linear_cross_entropy.triton_kernels import token_losses

CHUNK_BYTES = 512 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    z_loss: float = 0.0,
    chunks: int | None = None,
) -> Tensor:
    """The weighted sum over tokens of the cross entropy of `hidden @ weight.T`, gradients computed
    on the way.

        loss = Σ_t w_t [ lse_t - logit_t[label_t] + z_loss · lse_t² ],    lse_t = log Σ_w
        exp(logit_t[w])

    Logits are in the dtype of `hidden`, or that of autocast; softmax and sums in fp32.

    Args:
        hidden: [T, D].      weight: [W, D], the head (a tied embedding, for instance).
        labels: [T] integer; -100 is ignored.
        token_weights: [T], w_t, no gradient; 1 where left out.
        z_loss: weight of the squared log-normalizer.
        chunks: into how many parts T is cut; by default so many that the logits of one take at most
            512 MiB.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("linear_cross_entropy", "hidden", hidden, "T D")
    check_rank("linear_cross_entropy", "weight", weight, "W D")
    check("linear_cross_entropy", "weight", weight, (weight.shape[0], hidden.shape[1]), hidden)
    check("linear_cross_entropy", "labels", labels, (hidden.shape[0],), hidden)
    check("linear_cross_entropy", "token_weights", token_weights, (hidden.shape[0],), hidden)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if chunks is None:
        chunks = -(-hidden.shape[0] * weight.shape[0] * dtype.itemsize // CHUNK_BYTES)
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, token_weights, z_loss, max(1, chunks), dtype
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward, where each chunk's logits are at hand, and scaled in the
    backward."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, labels, token_weights, z_loss, chunks, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows, columns = hidden.to(dtype), weight.to(dtype)
        hidden_gradient = torch.empty_like(rows) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = hidden.new_zeros((), dtype=wide)
        chunk_length = max(1, -(-hidden.shape[0] // chunks))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_length):
                part = slice(start, start + chunk_length)
                chunk = rows[part]
                losses, gradient = _token_losses(
                    chunk @ columns.t(),
                    labels[part],
                    None if token_weights is None else token_weights[part],
                    z_loss,
                    need_hidden or need_weight,
                )
                loss += losses.sum()
                if hidden_gradient is not None:
                    torch.mm(gradient, columns, out=hidden_gradient[part])
                if weight_gradient is not None:
                    weight_gradient += gradient.t() @ chunk
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient):
        gradients = (
            None if gradient is None else gradient.to(dtype) * loss_gradient.to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None, None


def _token_losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses of the tokens, and the gradient of the logits; the logits are not kept."""
    if capability(logits) == 90 and logits.dtype != torch.float64:
        losses = token_losses(logits, labels, weights, z_loss, gradient)
        return losses, logits
    return token_losses_reference(logits, labels, weights, z_loss, gradient)
