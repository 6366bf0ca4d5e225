"""The sum of gradients over all ranks at ZeRO 0, under way while the backward goes on.

DeepSpeed would sum them after the backward, in buckets that it copies gradients to and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Work

from fla_dist.parallel.watch import current_watch, explained

SMALL = 1 << 16
"""Elements below which gradients are summed together, after the backward."""


class GradientSum:
    """Sums the gradients of `parameters` over all ranks, each in place.

    A large one sets out when the backward has made it and all large ones that come after it in the
    model: the order is the same on every rank, whatever its autograd does first.

    Args:
        last: whether the backward that runs is the step's last, whose gradients are whole.
        dtype: what the ranks send and add; None for the gradients' own.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        last: Callable[[], bool],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._last, self._dtype = last, dtype
        backwards = [p for p in parameters if p.requires_grad][::-1]
        self._large = [p for p in backwards if p.numel() >= SMALL]
        self._small = [p for p in backwards if p.numel() < SMALL]
        self._made: set[nn.Parameter] = set()
        self._started = 0
        self._works: list[tuple[Tensor, Tensor, Work]] = []
        for parameter in self._large:
            parameter.register_post_accumulate_grad_hook(self._on_made)

    def finish(self) -> None:
        """Sums what is left; afterwards this stream sees the sums of all."""
        self._made.update(self._large)
        self._start_made()
        small = [_gradient(p) for p in self._small]
        if small:
            whole = torch.cat([gradient.flatten() for gradient in small])
            self._start(whole)
            if watch := current_watch():  # the last to end, and small: the watch keeps it a second
                watch.add("gradients", range(dist.get_world_size()), self._works[-1][2])
        with explained("gradients", range(dist.get_world_size())):
            for gradient, sent, work in self._works:
                work.wait()
                if sent is not gradient:
                    gradient.copy_(sent)
        if small:
            parts = whole.split([gradient.numel() for gradient in small])
            torch._foreach_copy_(small, [x.view_as(y) for x, y in zip(parts, small, strict=True)])
        self._made.clear()
        self._works.clear()
        self._started = 0

    def _on_made(self, parameter: nn.Parameter) -> None:
        if self._last():
            self._made.add(parameter)
            self._start_made()

    def _start_made(self) -> None:
        while self._started < len(self._large) and self._large[self._started] in self._made:
            self._start(_gradient(self._large[self._started]))
            self._started += 1

    def _start(self, gradient: Tensor) -> None:
        sent = gradient.to(self._dtype or gradient.dtype)
        work = dist.all_reduce(sent, async_op=True)
        assert work is not None
        self._works.append((gradient, sent, work))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros where the backward did not come by."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
