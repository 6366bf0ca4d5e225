"""The one place where recurrent states cross ranks.

Each rank folds its stretches into one affine map, an asynchronous all-gather gives every rank all
maps in fp32, and each folds those before it, left to right. The reverse scan sends the states only:
the transitions are kept from the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.state import Diagonal, Pending, fold
from fla_dist.parallel.collectives import all_gather
from fla_dist.parallel.mesh import Mesh


class StateScan:
    """Joins the stretches of all ranks of a sequence (the `Scan` protocol of
    fla_dist.kernels.state)."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def start(
        self,
        transition: Diagonal,
        state: Tensor,
        initial: Tensor | None,
        *,
        reverse_of: Pending | None = None,
    ) -> PendingStateScan:
        if reverse_of is None:
            return PendingStateScan(self._mesh, transition, state, initial, None)
        assert isinstance(reverse_of, PendingStateScan)
        return PendingStateScan(self._mesh, transition, state, initial, reverse_of.rank_log_decays)


class PendingStateScan:
    """A scan whose all-gather is under way.

    Attributes:
        transition: of this rank's stretches.
        rank_log_decays: [P, B, ...], the composed log decay of each rank's slice; there after a
            forward's `wait`.
    """

    def __init__(
        self,
        mesh: Mesh,
        transition: Diagonal,
        state: Tensor,
        initial: Tensor | None,
        rank_log_decays: Tensor | None,
    ) -> None:
        self._mesh = mesh
        self.transition = transition
        self.rank_log_decays = rank_log_decays
        self._reverse = rank_log_decays is not None
        if not self._reverse and mesh.sequence_parallel_rank > 0:
            initial = None  # the stream starts on the first rank
        entering = torch.zeros_like(state[:, 0]) if initial is None else initial
        _, leaving = fold(transition, state, entering, reverse=self._reverse)
        parts = [leaving] if self._reverse else [leaving, transition.total().log_decay]
        message = torch.cat([part.reshape(-1).to(leaving.dtype) for part in parts])
        self._gathered: Any = message.new_empty(mesh.sequence_parallel_size, message.numel())
        self._work: Any = all_gather(
            self._gathered.view(-1), message, group=mesh.sequence_group, async_op=True
        )
        self._arguments: Any = (state, entering, message)

    def wait(self) -> tuple[Tensor, Tensor]:
        state, entering, _ = self._arguments
        self._work.wait()
        size, rank = self._mesh.sequence_parallel_size, self._mesh.sequence_parallel_rank
        count = entering.numel()
        rank_states = self._gathered[:, :count].reshape(size, *entering.shape)
        if self.rank_log_decays is None:
            shape = self.transition.total().log_decay[:, 0].shape
            self.rank_log_decays = self._gathered[:, count:].reshape(size, *shape).clone()
        self._gathered = self._work = self._arguments = None
        before = range(size - 1, rank, -1) if self._reverse else range(rank)
        incoming = torch.zeros_like(entering)
        for other in before:
            # dim 1 of a transition is the stretch: here one, the rank's slice.
            factor = Diagonal(
                self.rank_log_decays[other].unsqueeze(1), self.transition.rate
            ).factor()[:, 0]
            incoming = factor * incoming + rank_states[other]
        entries, final = fold(self.transition, state, incoming + entering, reverse=self._reverse)
        if self._reverse and rank > 0:
            final = torch.zeros_like(final)  # this rank's initial state was not used
        return entries, final
