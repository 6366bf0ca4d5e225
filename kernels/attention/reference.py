"""Causal softmax attention in plain PyTorch: the truth, and the backend where PyTorch's fast
kernels do not serve.

q: [B, T, H, K].  k, v: [B, L + T, G, K], L tokens of left context before the slice; H is a multiple
of G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 512


def attention_dense(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """Every score at once, as the formula reads: query t sees the key i tokens before it where 0 ≤
    i ≤ positions_t [B, T] and i < window."""
    length, context = q.shape[1], k.shape[1] - q.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    query_index = torch.arange(length, device=q.device) + context
    back = query_index[:, None] - torch.arange(k.shape[1], device=q.device)  # [T, L + T]
    seen = (back >= 0) & (back <= positions[..., None])  # [B, T, L + T]
    if window is not None:
        seen = seen & (back < window)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def attention_blocked(
    q: Tensor, k: Tensor, v: Tensor, first_seen: Tensor, window: int | None
) -> Tensor:
    """Blocks of queries against the keys that they can reach: no mask or score is larger than
    [block, reach]. Query t sees the keys from first_seen_t [B, T] to its own (mask.py)."""
    length, context = q.shape[1], k.shape[1] - q.shape[1]
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        lowest = -context if window is None else max(-context, start - window + 1)
        queries = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(lowest, stop, device=q.device)
        seen = (keys <= queries) & (keys >= first_seen[:, start:stop, None])
        output = F.scaled_dot_product_attention(
            q[:, start:stop].transpose(1, 2),
            k[:, context + lowest : context + stop].transpose(1, 2),
            v[:, context + lowest : context + stop].transpose(1, 2),
            attn_mask=seen[:, None],
            enable_gqa=q.shape[2] != k.shape[2],
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)
