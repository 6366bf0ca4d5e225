"""Mamba-2's state space dual in plain PyTorch (arXiv:2405.21060): the truth.

x: [B, T, H, P].  dt: [B, T, H].  A, dt_bias, D: [H].  B, C: [B, T, G, N], H / G heads share each.
States: [B, H, N, P].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts


def of_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, N] as [B, T, H, N]; nothing is copied where there is one group."""
    batch, length, groups, size = x.shape
    x = x[:, :, :, None].expand(batch, length, groups, heads // groups, size)
    return x[:, :, 0] if groups == 1 else x.flatten(2, 3)


def state_space_dual_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token. The dtype of the inputs is that of the arithmetic."""
    batch, length, heads, width = x.shape
    B, C = of_heads(B, heads), of_heads(C, heads)
    dt = dt if dt_bias is None else F.softplus(dt + dt_bias)
    state = (
        x.new_zeros(batch, heads, B.shape[-1], width) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        added = B[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[..., None, :]
        state = (dt[:, t] * A).exp()[..., None, None] * state + added
        outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], state))
    y = torch.stack(outputs, dim=1)
    return y if D is None else y + D[:, None] * x, state
