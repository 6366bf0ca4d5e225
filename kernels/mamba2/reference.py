"""Mamba-2's state space dual in plain PyTorch (arXiv:2405.21060): the truth, and the CPU backend.

x: [B, T, H, P].  dt: [B, T, H].  A, dt_bias, D: [H].  B, C: [B, T, G, N], H / G heads share each.
States: [B, H, N, P].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked
from fla_dist.kernels.state import LOCAL, Scan


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


def through_attention(
    attention: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """By `attention(q, k, v, g)`, simple GLA with scale 1: C is its query, B its key, Δ x its
    value, Δ A its log decay (the paper's section 4)."""
    heads = x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    dt = dt if dt_bias is None else F.softplus(dt + dt_bias)
    y, state = attention(
        of_heads(C, heads), of_heads(B, heads), (dt[..., None] * x).to(x.dtype), dt * A
    )
    return y if D is None else y + D[:, None] * x, state


def state_space_dual_chunked(
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
    scan: Scan = LOCAL,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """By simple GLA's chunked form. In fp32, or fp64 if given."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return simple_gla_chunked(
            q, k, v, g, scale=1.0, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
            chunk_size=chunk_size,
        )  # fmt: skip

    return through_attention(attention, *(y.to(wide) for y in (x, dt, A, B, C)), dt_bias, D)
