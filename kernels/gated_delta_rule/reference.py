"""The gated delta rule in plain PyTorch (arXiv:2412.06464): the truth, and the CPU backend.

q, k: [B, T, H, K].  v: [B, T, H, V].  g, beta: [B, T, H]; g is the natural log of the decay, at
most 0. States: [B, H, K, V].
"""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.kda.reference import kda_chunked, kda_recurrent
from fla_dist.kernels.state import LOCAL, Scan


def gated_delta_rule_recurrent(
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
    """KDA's, with one decay for all of a head's keys."""
    return kda_recurrent(
        q, k, v, g[..., None], beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids,
    )  # fmt: skip


def gated_delta_rule_chunked(
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
    """KDA's, with one decay for all of a head's keys."""
    return kda_chunked(
        q, k, v, g[..., None], beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        chunk_size=chunk_size,
    )  # fmt: skip
