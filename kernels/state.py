"""The affine summary of a stretch of tokens, and how stretches are joined.

Over any stretch of tokens a recurrent mixer maps the state that enters it to the state that leaves
it by

    S_out = A S_in + B.

A chunk, a segment of one GPU's slice and the slice of one rank are such stretches at three sizes
and compose by the same rule. `Diagonal` and `Dense` are the two kinds of A. An op summarizes its
stretches, starts a *scan* over them, does what needs no incoming state, and then waits for the
state that enters each stretch. `LOCAL` joins the stretches of one process;
`fla_dist.parallel.state_scan` joins those of all ranks.

Shapes: B batch, S stretches in the order of time, `...` the state (for instance H, K, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from fla_dist.kernels.common.precision import without_autocast

RESET = -1e30
"""The log decay of a stretch in which a document starts. It is finite, so that its gradient is 0
and not NaN, and exp(RESET) is 0."""


@dataclass(frozen=True)
class Diagonal:
    """The transition S -> exp(rate · log_decay) ⊙ S of each stretch.

    Args:
        log_decay: [B, S, ...], broadcastable to the states; its product with `rate` is at most 0.
        rate: [...] or None for 1; known to every rank and never sent (Mamba's A, whose log_decay is
            the sum of Δ).
    """

    log_decay: Tensor
    rate: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        return self.log_decay, self.rate

    @property
    def sent(self) -> Tensor:
        """What another rank must be told of it."""
        return self.log_decay

    def with_sent(self, log_decay: Tensor) -> Diagonal:
        return Diagonal(log_decay, self.rate)

    def factor(self) -> Tensor:
        exponent = self.log_decay if self.rate is None else self.log_decay * self.rate
        return exponent.exp()

    @staticmethod
    def act(factor: Tensor, state: Tensor, *, transposed: bool) -> Tensor:
        return factor * state

    def total(self) -> Diagonal:
        """All stretches composed into one, [B, 1, ...]."""
        return Diagonal(self.log_decay.sum(dim=1, keepdim=True), self.rate)

    def gradients(self, leaving: Tensor, entering: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of `tensors` from those of the leaving states and the entering states."""
        exponent = leaving * self.factor() * entering
        if self.rate is None:
            return exponent.sum_to_size(self.log_decay.shape), None
        return (
            (exponent * self.rate).sum_to_size(self.log_decay.shape),
            (exponent * self.log_decay).sum_to_size(self.rate.shape),
        )

    def rows(self, state: Tensor) -> tuple[Diagonal, Tensor]:
        """One stretch with its state [B, 1, ...] as R independent rows with one log decay each:
        log_decay [1, 1, R, 1], rate and state [1, 1, R, C]."""
        log_decay = self.log_decay
        depth = max(
            (axis + 1 for axis in range(2, state.ndim) if log_decay.shape[axis] > 1), default=2
        )
        rows = state.shape[0] * math.prod(state.shape[2:depth])
        log_decay = log_decay.expand(*state.shape[:depth], *log_decay.shape[depth:])
        rate = self.rate
        if rate is not None:
            rate = rate.expand(state.shape[0], *state.shape[2:]).reshape(1, 1, rows, -1)
        return Diagonal(log_decay.reshape(1, 1, rows, 1), rate), state.reshape(1, 1, rows, -1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Diagonal:
        """With each of its tensors replaced."""
        rate = None if self.rate is None else function(self.rate)
        return Diagonal(function(self.log_decay), rate)


@dataclass(frozen=True)
class Dense:
    """The transition S -> matrix S of each stretch (delta rules).

    Args:
        matrix: [B, S, ..., K, K], with states [B, S, ..., K, V]; zeros where a document starts.
    """

    matrix: Tensor

    @property
    def tensors(self) -> tuple[Tensor, None]:
        return self.matrix, None

    @property
    def sent(self) -> Tensor:
        return self.matrix

    def with_sent(self, matrix: Tensor) -> Dense:
        return Dense(matrix)

    def factor(self) -> Tensor:
        return self.matrix

    @staticmethod
    @without_autocast
    def act(factor: Tensor, state: Tensor, *, transposed: bool) -> Tensor:
        return (factor.mT if transposed else factor) @ state

    def total(self) -> Dense:
        """All stretches composed into one, [B, 1, ..., K, K]: the last one leftmost."""
        product, *others = self.matrix.unbind(dim=1)
        for matrix in others:
            product = Dense.act(matrix, product, transposed=False)
        return Dense(product.unsqueeze(1))

    def gradients(self, leaving: Tensor, entering: Tensor) -> tuple[Tensor, None]:
        return (leaving @ entering.mT).sum_to_size(self.matrix.shape), None

    def rows(self, state: Tensor) -> tuple[Dense, Tensor]:
        """One stretch with its state [B, 1, ..., K, V] as R independent rows: matrix
        [1, 1, R, K, K], state [1, 1, R, K, V]."""
        matrix = self.matrix.expand(*state.shape[:-2], *self.matrix.shape[-2:])
        return (
            Dense(matrix.reshape(1, 1, -1, *matrix.shape[-2:])),
            state.reshape(1, 1, -1, *state.shape[-2:]),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(function(self.matrix))


Transition: TypeAlias = "Diagonal | Dense"


class Pending(Protocol):
    """A scan under way. After `wait` it keeps the transitions only, for the reverse scan."""

    transition: Transition

    def wait(self) -> tuple[Tensor, Tensor]:
        """Entering states of every stretch [B, S, ...], and the state after the last one [B, ...].
        Called once.

        In reverse the second is the gradient of the forward's `initial`."""


class Scan(Protocol):
    """Joins stretches. A reverse scan runs from the last stretch to the first with the transposed
    transitions."""

    def start(
        self,
        transition: Transition,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> Pending:
        """Starts joining; collectives only, nothing that autograd sees.

        Args:
            transition: of each stretch, [B, S, ...].
            state: [B, S, ...], what each stretch adds: B, or in reverse the gradient that its own
                tokens give its entering state.
            initial: [B, ...], the state before the stream's first stretch; in reverse the gradient
                of this process' final state.
            reverse_of: the pending forward scan whose gradient this is; its transitions need not be
                sent again.
        """


def fold(
    transition: Transition, state: Tensor, entering: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Entering states of every stretch [B, S, ...] and the state after the last, one stretch after
    the other."""
    factor = transition.factor()
    count = state.shape[1]
    entries: list[Tensor] = [entering] * count
    for index in reversed(range(count)) if reverse else range(count):
        entries[index] = entering
        passed = transition.act(factor[:, index], entering, transposed=reverse)
        entering = passed + state[:, index]
    return torch.stack(entries, dim=1), entering


class LocalPending:
    """A scan over the stretches of one process; the work is done in `wait`."""

    def __init__(
        self, transition: Transition, state: Tensor, initial: Tensor | None, reverse: bool
    ) -> None:
        self.transition = transition
        self._arguments: Any = (state, initial, reverse)

    def wait(self) -> tuple[Tensor, Tensor]:
        state, initial, reverse = self._arguments
        self._arguments = None
        entering = torch.zeros_like(state[:, 0]) if initial is None else initial
        return fold(self.transition, state, entering, reverse=reverse)


class LocalScan:
    """Joins the stretches of one process that holds the whole sequence."""

    def start(
        self,
        transition: Transition,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> LocalPending:
        return LocalPending(transition, state, initial, reverse_of is not None)


LOCAL = LocalScan()


class JoinedStates:
    """A differentiable scan under way: what is computed between its making and `wait` overlaps with
    the exchange.

    The backward overlaps likewise: the gradient's exchange starts where the forward's ended, and is
    waited for where it started.
    """

    def __init__(
        self, scan: Scan, transition: Transition, state: Tensor, initial: Tensor | None
    ) -> None:
        self._link = _Link(scan, type(transition))
        self._token = _Start.apply(self._link, *transition.tensors, state, initial)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Entering states of every stretch [B, S, ...], and the state after this process' last one
        [B, ...]."""
        return _Wait.apply(self._link, self._token)


class _Link:
    """What the two ends of a scan tell each other. It holds no tensor that the two made: one whose
    grad_fn leads back here would be a cycle that is never freed."""

    def __init__(self, scan: Scan, kind: type[Transition]) -> None:
        self.scan = scan
        self.kind = kind
        self.pending: Any = None
        self.reverse: Any = None
        self.entries: Tensor | None = None

    def transition(self, first: Tensor, second: Tensor | None) -> Any:
        return Dense(first) if self.kind is Dense else Diagonal(first, second)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, first, second, state, initial):
        ctx.link = link
        ctx.has_initial = initial is not None
        ctx.save_for_backward(first, second)
        link.pending = link.scan.start(link.transition(first, second), state, initial)
        return state.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        link = ctx.link
        leaving_gradients, initial_gradient = link.reverse.wait()
        transition = link.transition(*ctx.saved_tensors)
        gradients = transition.gradients(leaving_gradients, link.entries)
        link.reverse = link.entries = None
        return (
            None,
            *gradients,
            leaving_gradients,
            initial_gradient if ctx.has_initial else None,
        )


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, token):
        entries, final = link.pending.wait()
        ctx.link = link
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(entries)
        return entries, final

    @staticmethod
    def backward(ctx, entries_gradient, final_gradient):
        link = ctx.link
        (link.entries,) = ctx.saved_tensors
        if entries_gradient is None:
            entries_gradient = torch.zeros_like(link.entries)
        link.reverse = link.scan.start(
            link.pending.transition, entries_gradient, final_gradient, reverse_of=link.pending
        )
        return None, entries_gradient.new_zeros(())
