"""Causal softmax attention: the public function, and the choice among PyTorch's own kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fla_dist.kernels.attention.mask import AttentionMask
from fla_dist.kernels.attention.reference import attention_blocked
from fla_dist.kernels.common.validation import check, check_rank

_flex_attention = torch.compile(flex_attention)
"""Outside of compiled blocks, where lengths vary: validation, prompts."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Causal softmax attention inside documents, full or over a sliding window.

        o_t = Σ_s softmax_s(q_t · k_s / √K) v_s     over the keys s with first_t ≤ s ≤ t

    Where every query sees all keys before it, PyTorch's flash attention; on a GPU under windows or
    documents FlexAttention, which passes over the blocks that no query sees; elsewhere the plain
    form.

    Args:
        q: [B, T, H, K].
        k, v: [B, L + T, G, K], with L ≥ 0 tokens of left context before the slice; H must be a
            multiple of G.
        mask: of the same B, T and L (`attention_mask`).

    Returns:
        o [B, T, H, K].

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("attention", "q", q, "B T H K")
    check_rank("attention", "k", k, "B L+T G K")
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    check("attention", "mask.first", mask.first, (batch, length), q)
    check("attention", "k", k, (batch, mask.context + length, kv_heads, size), q)
    check("attention", "v", v, tuple(k.shape), q)
    if heads % kv_heads:
        raise ValueError(
            f"attention: q has {heads} heads, expected a multiple of the {kv_heads} of k"
        )
    grouped = heads != kv_heads
    by_blocks = mask.blocks is not None and q.dtype != torch.float64
    if not (mask.causal and mask.context == 0) and not by_blocks:
        return attention_blocked(q, k, v, mask.first, mask.window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if by_blocks:
        o = _flex_attention(q, k, v, block_mask=mask.blocks, enable_gqa=grouped)
    else:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o.transpose(1, 2)
