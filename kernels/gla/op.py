"""Gated linear attention: the public function."""

from __future__ import annotations

from fla_dist.kernels.common.validation import check, check_rank
from fla_dist.kernels.gla.reference import gla_chunked
from fla_dist.kernels.state import LOCAL, Scan
from torch import Tensor


def gla(
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
    """Gated linear attention (arXiv:2312.06635, eq. 3).

        S_t = diag(exp g_t) S_{t-1} + k_tᵀ v_t        o_t = scale · q_t S_t

    Args:
        q, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, K], natural log of the decay, at most 0.
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
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("gla", "q", q, "B T H K")
    check_rank("gla", "v", v, "B T H V")
    batch, length, heads, key_size = q.shape
    check("gla", "k", k, (batch, length, heads, key_size), q)
    check("gla", "g", g, (batch, length, heads, key_size), q)
    check("gla", "v", v, (batch, length, heads, v.shape[-1]), q)
    check("gla", "initial_state", initial_state, (batch, heads, key_size, v.shape[-1]), q)
    check("gla", "doc_ids", doc_ids, (batch, length), q)
    output, final_state = gla_chunked(
        q, k, v, g,
        scale=key_size**-0.5 if scale is None else scale,
        initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return output.to(v.dtype), final_state
