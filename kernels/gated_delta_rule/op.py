"""The gated delta rule: the public function."""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.common.validation import check, check_attention, check_rank
from fla_dist.kernels.gated_delta_rule.reference import gated_delta_rule_chunked
from fla_dist.kernels.state import LOCAL, Scan


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (arXiv:2412.06464, eq. 10).

        S_t = exp(g_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    Args:
        q, k: [B, T, Hk, K], bf16 | fp16 | fp32 | fp64; k of length 1, else the state may grow.
            H is a multiple of Hk: key head i serves the value heads i·H/Hk and those that follow.
        v: [B, T, H, V].      g: [B, T, H], natural log of the decay, at most 0.
        beta: [B, T, H], 0 to 1, or to 2 for negative eigenvalues.
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
    check_rank("gated_delta_rule", "q", q, "B T H K")
    check_rank("gated_delta_rule", "v", v, "B T H V")
    check("gated_delta_rule", "k", k, tuple(q.shape), q)
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"gated_delta_rule: v has {v.shape[2]} heads, expected a multiple of q's {q.shape[2]}"
        )
    q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], dim=2) for x in (q, k))
    check_attention("gated_delta_rule", q, k, v, initial_state, doc_ids)
    check("gated_delta_rule", "g", g, tuple(v.shape[:3]), q)
    check("gated_delta_rule", "beta", beta, tuple(v.shape[:3]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final_state = gated_delta_rule_chunked(
        q, k, v, g, beta,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return o.to(v.dtype), final_state
