"""Kimi delta attention in plain PyTorch (arXiv:2510.26692): the truth, and the CPU backend.

q, k, g: [B, T, H, K]; g is the natural log of the decay, at most 0.  v: [B, T, H, V].  beta: [B, T,
H]. States: [B, H, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.delta import delta_chunked
from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.state import LOCAL, Scan


def kda_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, equation 1. The dtype of the inputs is that of the arithmetic."""
    batch, length, heads, key_size = q.shape
    state = (
        q.new_zeros(batch, heads, key_size, v.shape[-1]) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        state = g[:, t].exp()[..., None] * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t][..., None] * written[..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def kda_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """`delta_chunked` with a = exp(g) ⊙ k, b = -beta k."""
    written = beta[..., None] * k
    return delta_chunked(
        q, written, v, g.exp() * k, -written, g,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan, chunk_size=chunk_size,
    )  # fmt: skip
