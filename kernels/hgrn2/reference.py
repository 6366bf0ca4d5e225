"""HGRN2 token by token in plain PyTorch (arXiv:2404.07904): the truth.

q, g: [B, T, H, K].  v: [B, T, H, V].  g is the natural log of the forget gate, at most 0.  States:
[B, H, K, V]. Its chunked form is GLA's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts


def hgrn2_recurrent(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Section 3.2's recurrence: what a forget gate leaves free the input takes. The dtype of the
    inputs is that of the arithmetic."""
    batch, length, heads, key_size = q.shape
    state = (
        q.new_zeros(batch, heads, key_size, v.shape[-1]) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        forget = g[:, t].exp()[..., None]
        state = forget * state + (1 - forget) * v[:, t][..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state
