"""A chunk's losses and the gradient of its logits, in place, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.linear_cross_entropy.reference import IGNORED

BLOCK, WARPS = 4096, 8


@Kernel
@triton.jit
def losses_kernel(
    p_logits, p_labels, p_weights, p_losses, z_loss, W,
    IGNORED: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Grid: tokens. A program owns a row of logits and reads it twice: once for its log-normalizer,
    lse = m + log Σ exp(x - m) with the maximum m so far, once to put the gradient
    weight · [(1 + 2 z lse) exp(x - lse) - (1 at the label)] in its place. It moves 6 bytes a logit
    in bf16, of which 2 come from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * W
    label = tl.load(p_labels + row)
    if label == IGNORED:
        tl.store(p_losses + row, 0.0)
        if GRADIENT:
            for start in range(0, W, BW):
                o_w = start + tl.arange(0, BW)
                zeros = tl.zeros([BW], dtype=p_logits.dtype.element_ty)
                tl.store(p_row + o_w, zeros, mask=o_w < W)
        return
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(p_weights + row).to(tl.float32)
    target = tl.load(p_row + label).to(tl.float32)
    b_max = tl.full([BW], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BW], dtype=tl.float32)
    for start in range(0, W, BW):
        o_w = start + tl.arange(0, BW)
        b_x = tl.load(p_row + o_w, mask=o_w < W, other=-float("inf")).to(tl.float32)
        b_new = tl.maximum(b_max, b_x)
        # A lane that saw no logit yet has the maximum -inf; exp(-inf - -inf) would be NaN.
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.exp(b_x - b_shift)
        b_max = b_new
    maximum = tl.max(b_max, axis=0)
    normalizer = maximum + tl.log(tl.sum(b_sum * tl.exp(b_max - maximum), axis=0))
    tl.store(p_losses + row, weight * (normalizer - target + z_loss * normalizer * normalizer))
    if GRADIENT:
        scale = weight * (1.0 + 2.0 * z_loss * normalizer)
        for start in range(0, W, BW):
            o_w = start + tl.arange(0, BW)
            b_x = tl.load(p_row + o_w, mask=o_w < W, other=-float("inf")).to(tl.float32)
            b_gradient = scale * tl.exp(b_x - normalizer) - tl.where(o_w == label, weight, 0.0)
            tl.store(p_row + o_w, b_gradient.to(p_logits.dtype.element_ty), mask=o_w < W)


@torch.library.custom_op("fla_dist::token_losses", mutates_args=("logits",))
def token_losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float, gradient: bool
) -> Tensor:
    """The losses [c] fp32 of a chunk's tokens from their logits [c, W], which become their own
    gradients where `gradient`."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    losses_kernel[(rows,)](
        logits, labels, weights, losses, z_loss, width, IGNORED, weights is not None, gradient,
        min(BLOCK, triton.next_power_of_2(width)), num_warps=WARPS,
    )  # fmt: skip
    return losses


@token_losses.register_fake
def _(logits, labels, weights, z_loss, gradient):
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
