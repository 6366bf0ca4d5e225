"""RWKV7's recurrence: the public function."""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.common.validation import check, check_attention, check_rank
from fla_dist.kernels.rwkv7.reference import rwkv7_chunked
from fla_dist.kernels.state import LOCAL, Scan


def rwkv7(
    r: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """RWKV7's recurrence, the generalized delta rule (arXiv:2503.14456), its state transposed.

        S_t = (diag(exp g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ r_t

    The paper's a_t is -κ̂ and its b_t is κ̂ ⊙ the in-context learning rate. The bonus of the current
    token is the mixer's.

    Args:
        r, k, a, b: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, K], natural log of the decay, at most 0.
        scale: 1 unless given.
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
    check_rank("rwkv7", "r", r, "B T H K")
    check_attention("rwkv7", r, k, v, initial_state, doc_ids)
    for name, x in (("g", g), ("a", a), ("b", b)):
        check("rwkv7", name, x, tuple(r.shape), r)
    scale = 1.0 if scale is None else scale
    o, final_state = rwkv7_chunked(
        r, g, k, v, a, b,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return o.to(v.dtype), final_state
