"""Gated slot attention: the public function."""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.common.validation import check, check_attention, check_rank
from fla_dist.kernels.gsa.reference import gsa_chunked
from fla_dist.kernels.state import LOCAL, Scan


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Gated slot attention (arXiv:2409.07146, equations 6 to 8): softmax attention over M slots,
    each a gated mean of the keys and of the values.

        K_t = diag(exp g_t) K_{t-1} + (1 - exp g_t)ᵀ k_t      V_t likewise of v_t
        o_t = softmax(scale · q_t K_tᵀ) V_t

    Served by the chunked reference in plain PyTorch on every device.

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, M], natural log of the slots' forget gates, at most 0.
        scale: 1/√K unless given.
        initial_state: [B, H, M, K + V] fp32, the slots' keys and values before the first token of
            the whole stream (of the first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, M, K + V] fp32: the state after the last
        token of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    check_attention("gsa", q, k, v, None, doc_ids)
    check_rank("gsa", "g", g, "B T H M")
    batch, length, heads, key_size = q.shape
    slots, width = g.shape[-1], key_size + v.shape[-1]
    check("gsa", "g", g, (batch, length, heads, slots), q)
    check("gsa", "initial_state", initial_state, (batch, heads, slots, width), q)
    scale = key_size**-0.5 if scale is None else scale
    o, final_state = gsa_chunked(
        q, k, v, g, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan
    )
    return o.to(v.dtype), final_state
