"""The delta rule in plain PyTorch (arXiv:2406.06484): the truth, and the CPU backend.

q, k: [B, T, H, K].  v: [B, T, H, V].  beta: [B, T, H].  States: [B, H, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.kda.reference import kda_chunked, kda_recurrent
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
    """KDA's, without decay."""
    return kda_recurrent(
        q, k, v, torch.zeros_like(beta[..., None]), beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids,
    )  # fmt: skip


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
    """KDA's, without decay."""
    return kda_chunked(
        q, k, v, torch.zeros_like(beta[..., None]), beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        chunk_size=chunk_size,
    )  # fmt: skip
