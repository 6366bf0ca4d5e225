"""Retention, and linear attention without a decay: the public functions, settings of simple GLA."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.simple_gla.op import scalar_decay_attention
from fla_dist.kernels.state import LOCAL, Scan


def retention_decay(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """[H] fp32, RetNet's log decays (arXiv:2307.08621, equation 8): γ_h = 1 - 2^(-5-h)."""
    head = torch.arange(num_heads, dtype=torch.float32, device=device)
    return (-torch.exp2(-5 - head)).log1p()


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Retention (arXiv:2307.08621, equation 6): a fixed decay a head. With other decays it is
    Lightning attention.

        S_t = exp(log_decay) S_{t-1} + k_tᵀ v_t        o_t = scale · q_t S_t

    Args:
        log_decay: [H], natural log of the decay, at most 0; `retention_decay` gives RetNet's.
        q, k, v, scale, initial_state, doc_ids, scan: as simple_gla's.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, K, V] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    check_attention("retention", q, k, v, initial_state, doc_ids)
    check("retention", "log_decay", log_decay, (q.shape[2],), q)
    return scalar_decay_attention(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention without a decay or a normalizer (arXiv:2006.16236): o_t = scale ·
    q_t Σ_{s<=t} k_sᵀ v_s.

    Arguments and results are simple_gla's, without g.
    """
    check_attention("linear_attention", q, k, v, initial_state, doc_ids)
    return scalar_decay_attention(
        q, k, v, None, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
    )
