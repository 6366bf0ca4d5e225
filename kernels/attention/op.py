"""Causal softmax attention: the public function."""

from __future__ import annotations

from torch import Tensor

from fla_dist.kernels.attention.reference import attention_blocked
from fla_dist.kernels.common.validation import check, check_rank


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor, window: int | None = None
) -> Tensor:
    """Causal softmax attention inside documents, full or over a sliding window.

        o_t = Σ_s softmax_s(q_t · k_s / √K) v_s     over the keys s with 0 ≤ t - s ≤ positions_t and
        t - s < window

    Args:
        q: [B, T, H, K].
        k, v: [B, L + T, G, K], with L ≥ 0 tokens of left context before the slice; H must be a
            multiple of G.
        positions: [B, T] integer, each token's position in its document.
        window: tokens that a query sees, itself included; None for all.

    Returns:
        o [B, T, H, K].

    Raises:
        ValueError: shapes or devices that do not fit, naming the argument and what was expected.
    """
    check_rank("attention", "q", q, "B T H K")
    check_rank("attention", "k", k, "B L+T G K")
    batch, length, heads, size = q.shape
    check("attention", "k", k, (batch, k.shape[1], k.shape[2], size), q)
    check("attention", "v", v, tuple(k.shape), q)
    check("attention", "positions", positions, (batch, length), q)
    if k.shape[1] < length:
        raise ValueError(
            f"attention: k has {k.shape[1]} tokens, expected at least the {length} of q"
        )
    if heads % k.shape[2]:
        raise ValueError(
            f"attention: q has {heads} heads, expected a multiple of the {k.shape[2]} of k"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}, expected at least 1")
    return attention_blocked(q, k, v, positions, window)
