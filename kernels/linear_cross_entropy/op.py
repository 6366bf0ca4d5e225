"""The language model's head and its loss, chunk by chunk: no [T, vocabulary] tensor in whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.validation import check, check_rank

IGNORED = -100
CHUNK_BYTES = 256 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    chunks: int | None = None,
) -> Tensor:
    """The sum over tokens of the cross entropy of `hidden @ weight.T`, gradients computed on the
    way.

        loss = Σ_t [ lse_t - logit_t[label_t] + z_loss · lse_t² ],    lse_t = log Σ_w
        exp(logit_t[w])

    Args:
        hidden: [T, D].      weight: [W, D], the head (a tied embedding, for instance).
        labels: [T] integer; -100 is ignored.
        z_loss: weight of the squared log-normalizer.
        chunks: into how many parts T is cut; by default so many that the fp32 logits of one take at
            most 256 MiB.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("linear_cross_entropy", "hidden", hidden, "T D")
    check_rank("linear_cross_entropy", "weight", weight, "W D")
    check("linear_cross_entropy", "weight", weight, (weight.shape[0], hidden.shape[1]), hidden)
    check("linear_cross_entropy", "labels", labels, (hidden.shape[0],), hidden)
    if chunks is None:
        chunks = -(-hidden.shape[0] * weight.shape[0] * 4 // CHUNK_BYTES)
    return _LinearCrossEntropy.apply(hidden, weight, labels, z_loss, max(1, chunks))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward, where each chunk's logits are at hand, and scaled in the
    backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss, chunks):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        loss = hidden.new_zeros((), dtype=dtype)
        chunk_length = max(1, -(-hidden.shape[0] // chunks))
        for start in range(0, hidden.shape[0], chunk_length):
            rows = slice(start, start + chunk_length)
            logits = (hidden[rows] @ weight.t()).to(dtype)  # [c, W]
            valid = labels[rows] != IGNORED
            target = labels[rows].masked_fill(~valid, 0).unsqueeze(1)
            normalizer = logits.logsumexp(dim=1)
            token_loss = (
                normalizer - logits.gather(1, target).squeeze(1) + z_loss * normalizer.square()
            )
            loss += torch.where(valid, token_loss, 0).sum()
            if not (need_hidden or need_weight):
                continue
            gradient = logits.sub_(normalizer[:, None]).exp_()
            gradient *= (1 + 2 * z_loss * normalizer)[:, None]
            gradient.scatter_add_(1, target, -torch.ones_like(target, dtype=dtype))
            gradient *= valid[:, None]
            gradient = gradient.to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ weight
            if weight_gradient is not None:
                weight_gradient += gradient.t() @ hidden[rows]
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            None
            if hidden_gradient is None
            else hidden_gradient * loss_gradient.to(hidden_gradient.dtype),
            None
            if weight_gradient is None
            else (weight_gradient * loss_gradient).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
