"""RWKV6 token by token in plain PyTorch (arXiv:2404.05892): the truth.

r, k, g: [B, T, H, K]; g is the natural log of the decay w, at most 0.  v: [B, T, H, V].  u: [H, K].
States: [B, H, K, V]. Its chunked form is GLA's, one token late (op.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts


def rwkv6_recurrent(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations 18 and 19: a token sees the state before it, and itself through the bonus u. The
    dtype of the inputs is that of the arithmetic."""
    batch, length, heads, key_size = r.shape
    state = (
        r.new_zeros(batch, heads, key_size, v.shape[-1]) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        added = k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state + u[..., None] * added))
        state = g[:, t].exp()[..., None] * state + added
    return torch.stack(outputs, dim=1), state
