"""The delta rule in plain PyTorch (arXiv:2406.06484): the truth, and the CPU backend.

q, k: [B, T, H, K].  v: [B, T, H, V].  beta: [B, T, H].  States: [B, H, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.delta import delta_chunked
from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.state import LOCAL, Scan


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token: what the state holds along k_t is replaced, by the part beta_t,
    with v_t. The dtype of the inputs is that of the arithmetic."""
    batch, length, heads, key_size = q.shape
    state = (
        q.new_zeros(batch, heads, key_size, v.shape[-1]) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t][..., None] * written[..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """`delta_chunked` with a = k, b = -beta k."""
    written = beta[..., None] * k
    g = torch.zeros_like(beta[..., None])
    return delta_chunked(
        q, written, v, k, -written, g,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan, chunk_size=chunk_size,
    )  # fmt: skip
