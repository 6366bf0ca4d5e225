"""The fold of states, by the kernels where they serve, and the scan of one GPU that uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.delta_fold import LARGEST_KEY, dense_fold
from fla_dist.kernels.common.segments import fold_op
from fla_dist.kernels.state import LOCAL, Dense, Pending, Scan, Transition, fold


def fold_states(
    transition: Transition, state: Tensor, entering: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """`fla_dist.kernels.state.fold`, in one launch on a GPU; nothing that autograd sees."""
    if not state.is_cuda or state.dtype != torch.float32 or state.ndim > 5:
        return fold(transition, state, entering, reverse=reverse)
    return fold_by_kernel(transition, state, entering, reverse=reverse)


def compose(transition: Transition) -> Transition:
    """`transition.total()`, without a launch a stretch."""
    if isinstance(transition, Dense) and transition.matrix.is_cuda:
        return compose_by_kernel(transition)
    return transition.total()


def compose_by_kernel(transition: Dense) -> Dense:
    """What the stretches make of the identity."""
    matrix = transition.matrix
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    entering = identity.expand_as(matrix[:, 0])
    _, product = fold_by_kernel(transition, torch.zeros_like(matrix), entering, reverse=False)
    return Dense(product.unsqueeze(1))


def fold_by_kernel(
    transition: Transition, state: Tensor, entering: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """For states [B, S, ...] of at most three axes beside, in fp32."""
    if isinstance(transition, Dense):
        if state.shape[-2] > LARGEST_KEY or state.ndim != 5:
            return fold(transition, state, entering, reverse=reverse)
        matrix = transition.matrix.expand(*state.shape[:-2], *transition.matrix.shape[-2:])
        return dense_fold(matrix.contiguous(), state.contiguous(), entering.contiguous(), reverse)
    log_decay = transition.log_decay
    if transition.rate is not None:
        log_decay = log_decay * transition.rate
    missing = (1,) * (5 - state.ndim)
    entries, final = fold_op(
        log_decay.reshape(*log_decay.shape, *missing),
        state.reshape(*state.shape, *missing).contiguous(),
        entering.reshape(*entering.shape, *missing).contiguous(),
        reverse,
    )
    return entries.view(state.shape), final.view(entering.shape)


class _KernelPending:
    """A scan over the segments of one process: one launch, in `wait`."""

    def __init__(
        self, transition: Transition, state: Tensor, initial: Tensor | None, reverse: bool
    ) -> None:
        self.transition = transition
        self._arguments: Any = (state, initial, reverse)

    def wait(self) -> tuple[Tensor, Tensor]:
        state, initial, reverse = self._arguments
        self._arguments = None
        initial = None if initial is None else initial.contiguous()
        if isinstance(self.transition, Dense):
            return dense_fold(self.transition.matrix, state, initial, reverse)
        return fold_op(self.transition.log_decay, state, initial, reverse)


class _KernelScan:
    """`LOCAL` with its fold as one kernel, for states [B, S, H, K, V]."""

    def start(
        self,
        transition: Transition,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> _KernelPending:
        return _KernelPending(transition, state, initial, reverse_of is not None)


_KERNELS = _KernelScan()


def on_gpu(scan: Scan) -> Scan:
    """The scan to use for states on the GPU."""
    return _KERNELS if scan is LOCAL else scan
