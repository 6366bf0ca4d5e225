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
