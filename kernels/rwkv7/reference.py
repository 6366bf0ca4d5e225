"""RWKV7's recurrence in plain PyTorch (arXiv:2503.14456): the truth, and the CPU backend.

r, g, k, a, b: [B, T, H, K]; g is the natural log of the decay w, at most 0.  v: [B, T, H, V].
States: [B, H, K, V], the transpose of the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.delta import delta_chunked
from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.state import LOCAL, Scan


def rwkv7_recurrent(
    r: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token. The dtype of the inputs is that of the arithmetic."""
    batch, length, heads, key_size = r.shape
    state = (
        r.new_zeros(batch, heads, key_size, v.shape[-1]) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        held = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = g[:, t].exp()[..., None] * state + b[:, t][..., None] * held[..., None, :]
        state = state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    return torch.stack(outputs, dim=1), state


def rwkv7_chunked(
    r: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """`delta_chunked` with the receptance as its query."""
    return delta_chunked(
        r, k, v, a, b, g,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan, chunk_size=chunk_size,
    )  # fmt: skip
