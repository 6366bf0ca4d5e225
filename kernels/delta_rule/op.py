"""The delta rule: the public function."""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.delta_rule.reference import delta_rule_chunked
from fla_dist.kernels.gated_delta_rule.op import has_kernels, segmented_gated_delta_rule
from fla_dist.kernels.state import LOCAL, Scan


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """The delta rule (arXiv:2406.06484).

        S_t = (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64; k of length 1, else the state may grow.
        v: [B, T, H, V].      beta: [B, T, H], 0 to 1, or to 2 for negative eigenvalues.
        scale: 1/√K unless given.
        initial_state: [B, H, K, V] fp32, the state before the first token of the whole stream (of
            the first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, K, V] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
            expected.
    """
    check_attention("delta_rule", q, k, v, initial_state, doc_ids)
    check("delta_rule", "beta", beta, tuple(q.shape[:3]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if has_kernels(q, v):
        return segmented_gated_delta_rule(
            q, k, v, None, beta,
            scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    o, final_state = delta_rule_chunked(
        q, k, v, beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return o.to(v.dtype), final_state
