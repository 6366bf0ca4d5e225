"""Argument checks shared by the public functions: what is wrong, and what was expected."""

from __future__ import annotations

from torch import Tensor


def check(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless `tensor` (None passes) has `shape` and lies on `like`'s device."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}")


def check_rank(op: str, name: str, tensor: Tensor, axes: str) -> None:
    """Raises ValueError unless `tensor` has one axis for each letter of `axes`."""
    if tensor.ndim != len(axes.split()):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected [{', '.join(axes.split())}]"
        )


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> None:
    """Raises ValueError unless the arguments that all linear attentions share fit each other."""
    check_rank(op, "q", q, "B T H K")
    check_rank(op, "v", v, "B T H V")
    batch, length, heads, key_size = q.shape
    value_size = v.shape[-1]
    check(op, "k", k, (batch, length, heads, key_size), q)
    check(op, "v", v, (batch, length, heads, value_size), q)
    check(op, "initial_state", initial_state, (batch, heads, key_size, value_size), q)
    check(op, "doc_ids", doc_ids, (batch, length), q)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype}, expected q's {q.dtype}")
