"""The one place where recurrent states cross ranks.

Each rank folds its stretches into one affine map (A, B). Two exchanges give every rank the state
that enters its slice, in fp32:

- all-gather: every rank receives all maps and folds those before it, left to right;
- hierarchical, for sequences over several hosts: the rows of the state that do not mix (heads,
  channels) are dealt to the ranks of each host by an all-to-all; each folds its rows over the ranks
  of its host, all-gathers that part across hosts, folds over hosts and then again over its host's
  ranks, and a second all-to-all brings every rank its entering state. A host sends each rank's rows
  once across, whatever the number of its ranks.

The reverse scan sends B only: the transitions are kept from the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import compose, fold_states
from fla_dist.kernels.state import Pending, Transition
from fla_dist.parallel.collectives import Steps, Transfer, all_gather, all_to_all
from fla_dist.parallel.slices import Slices

Kept = list[Transition]
"""The transitions of other ranks that a forward scan received, for its reverse."""


class StateScan:
    """Joins the stretches of all ranks of a sequence (the `Scan` protocol of
    fla_dist.kernels.state)."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    @torch.compiler.disable
    def start(
        self,
        transition: Transition,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> PendingStateScan:
        if reverse_of is None:
            return PendingStateScan(self._slices, transition, state, initial, None)
        assert isinstance(reverse_of, PendingStateScan)
        return PendingStateScan(self._slices, transition, state, initial, reverse_of)


class PendingStateScan:
    """A scan whose exchange is under way.

    Attributes:
        transition: of this rank's stretches.
        total: of its slice, by rows.
        kept: of other ranks; there after a forward's `wait`.
    """

    def __init__(
        self,
        slices: Slices,
        transition: Transition,
        state: Tensor,
        initial: Tensor | None,
        forward: PendingStateScan | None,
    ) -> None:
        self.transition = transition
        self._reverse = forward is not None
        self._first = slices.rank == 0
        if not self._reverse and not self._first:
            initial = None  # the stream starts on the first rank
        entering = torch.zeros_like(state[:, 0]) if initial is None else initial
        _, leaving = fold_states(transition, state, entering, reverse=self._reverse)
        if forward is None:
            self.total, rows = compose(transition).rows(leaving.unsqueeze(1))
            self.kept: Kept = []
        else:
            self.total, self.kept = forward.total, forward.kept
            rows = leaving.reshape(forward.rows_shape)
        self.rows_shape: torch.Size = rows.shape
        hierarchical = slices.mesh.state_exchange == "hierarchical"
        steps = (_hierarchical if hierarchical else _gathered)(
            slices, self.total, rows, self.kept, self._reverse
        )
        phase = f"states, {'backward' if self._reverse else 'forward'}"
        self._transfer: Any = Transfer(steps, slices, phase, state.device)
        # On a GPU another stream still reads what was summarized: it is held until then.
        self._arguments: Any = (state, entering, rows)

    @torch.compiler.disable
    def wait(self) -> tuple[Tensor, Tensor]:
        state, entering, *_ = self._arguments
        incoming = self._transfer.wait().reshape(entering.shape)
        self._transfer = self._arguments = None
        entries, final = fold_states(
            self.transition, state, incoming + entering, reverse=self._reverse
        )
        if self._reverse and not self._first:
            final = torch.zeros_like(final)  # this rank's initial state was not used
        return entries, final


def _gathered(slices: Slices, total: Transition, rows: Tensor, kept: Kept, reverse: bool) -> Steps:
    message = _pack(total, rows, 1, reverse)
    gathered = message.new_empty(slices.size, message.numel())
    group = slices.mesh.sequence_group
    yield [all_gather(gathered.view(-1), message.view(-1), group=group, async_op=True)]
    others, states = _unpack(gathered, total, rows, kept, 0, reverse)
    return _passed(others, states, slices.rank, reverse)


def _hierarchical(
    slices: Slices, total: Transition, rows: Tensor, kept: Kept, reverse: bool
) -> Steps:
    mesh = slices.mesh
    local, hosts = mesh.ranks_per_host, slices.size // mesh.ranks_per_host
    host, place = divmod(slices.rank, local)
    count = rows.shape[2]
    share = -(-count // local)  # rows of a rank; the last may be padding

    # 1. Each rank receives its share of the rows from all ranks of its host, and folds them.
    rows, total = _padded(rows, share * local), total.map(lambda y: _padded(y, share * local))
    message = _pack(total, rows, local, reverse)
    received = torch.empty_like(message)
    yield [all_to_all(received, message, group=mesh.host_group, async_op=True)]
    own = slice(place * share, (place + 1) * share)
    total, rows = total.map(lambda y: y[:, :, own]), rows[:, :, own]
    ranks, rank_states = _unpack(received, total, rows, kept, 0, reverse)
    _, host_state = fold_states(ranks, rank_states, torch.zeros_like(rows[:, 0]), reverse=reverse)

    # 2. The share's maps of all hosts; what enters this host.
    message = _pack(ranks if reverse else compose(ranks), host_state.unsqueeze(1), 1, reverse)
    gathered = message.new_empty(hosts, message.numel())
    yield [all_gather(gathered.view(-1), message.view(-1), group=mesh.cross_group, async_op=True)]
    others, host_states = _unpack(gathered, total, rows, kept, 1, reverse)
    entering = _passed(others, host_states, host, reverse)

    # 3. What enters each rank of this host, and back to it.
    entries, _ = fold_states(ranks, rank_states, entering, reverse=reverse)
    message = entries.reshape(local, -1)
    received = torch.empty_like(message)
    yield [all_to_all(received, message, group=mesh.host_group, async_op=True)]
    return received.view(local * share, -1)[:count]


def _padded(y: Tensor, rows: int) -> Tensor:
    """y [1, 1, R, ...] with zeros for the rows beyond R."""
    return torch.cat([y, y.new_zeros(1, 1, rows - y.shape[2], *y.shape[3:])], dim=2)


def _pack(transition: Transition, rows: Tensor, parts: int, reverse: bool) -> Tensor:
    """[parts, n]: the rows cut into parts; with what must be told of their transitions, except in
    reverse."""
    sent = [rows] if reverse else [rows, transition.sent.to(rows.dtype)]
    return torch.cat([y.reshape(parts, -1) for y in sent], dim=1)


def _unpack(
    received: Tensor, own: Transition, rows: Tensor, kept: Kept, place: int, reverse: bool
) -> tuple[Transition, Tensor]:
    """Transition and state of each stretch from [stretches, n], of the shapes of `own` and `rows`
    but for dim 1; the transition goes to `kept`, and in reverse comes from there."""
    states = received[:, : rows.numel()].reshape(1, -1, *rows.shape[2:])
    if not reverse:
        sent = received[:, rows.numel() :].reshape(1, -1, *own.sent.shape[2:])
        kept.append(own.with_sent(sent.clone()))  # not a view of all that was received
    return kept[place], states


def _passed(transition: Transition, states: Tensor, index: int, reverse: bool) -> Tensor:
    """What the stretches before `index` (in reverse, after it) hand on."""
    zeros = torch.zeros_like(states[:, 0])
    entries, _ = fold_states(transition, states, zeros, reverse=reverse)
    return entries[:, index]
