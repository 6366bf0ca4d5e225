"""One block, [norm, mixer, norm, mlp] around the residual stream: how it is compiled, and what of
it is kept for the backward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Literal

import torch
import torch._functorch.config as partitioning
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fla_dist.models.layers import Normed, RMSNorm, SwiGLU
from fla_dist.models.mixers import Mixer
from fla_dist.models.stream import Stream
from fla_dist.parallel.exchange import LocalExchange, ReplayedExchange

ActivationCheckpointing = Literal["none", "selective", "full"]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        activation_checkpointing: `selective` keeps the block's input and what its scans and
            attention computed, and recomputes the rest, matrix products included; `full` keeps the
            input only. What came from other ranks is kept by both.
        compiled: in training the block runs through torch.compile, one graph for all blocks of a
            kind; its backward recomputes pointwise work by itself. Blocks that keep activations
            selectively run as they are where the sequence is divided over ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        mixer: Mixer,
        norm_eps: float,
        activation_checkpointing: ActivationCheckpointing,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(hidden_size, norm_eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)
        self.activation_checkpointing = activation_checkpointing
        self.compiled = compiled

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self._whole(x, stream)
        whole = _compiled(Block._whole) if self.compiled else Block._whole
        if self.activation_checkpointing == "none":
            return whole(self, x, stream)
        alone = isinstance(stream.exchange, LocalExchange)
        if self.activation_checkpointing == "full":
            if alone:
                return _checkpointed(whole, self, x, stream)
            replayed = ReplayedExchange(stream.exchange)
            return _checkpointed(
                whole, self, x, stream.with_exchange(replayed), context_fn=replayed.contexts
            )
        if alone:
            selective = _compiled(Block._selective) if self.compiled else Block._selective
            return selective(self, x, stream)
        replayed = ReplayedExchange(stream.exchange)
        return _checkpointed(
            Block._whole,
            self,
            x,
            stream.with_exchange(replayed),
            context_fn=lambda: _both(replayed.contexts(), keep_kernels()),
        )

    def _whole(self, x: Tensor, stream: Stream) -> Tensor:
        x = x + self.mixer(Normed(x, self.mixer_norm), stream)
        return x + self.mlp(Normed(x, self.mlp_norm))

    def _selective(self, x: Tensor, stream: Stream) -> Tensor:
        return _checkpointed(Block._whole, self, x, stream, context_fn=keep_kernels)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile, told that also what only feeds a matrix product of the backward is made again
    there: norms' outputs, and weights in autocast's dtype."""
    compiled = torch.compile(function, dynamic=False)

    def run(*arguments: Any) -> Tensor:
        with partitioning.patch(ban_recompute_materialized_backward=False):
            return compiled(*arguments)

    return run


def _checkpointed(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    return checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False, **options
    )


def keep_kernels() -> Contexts:
    """Contexts of torch.utils.checkpoint: the results of this project's scans and of attention are
    kept."""
    return create_selective_checkpoint_contexts(_policy)


ATTENTION = (
    torch.ops.higher_order.flex_attention,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


def _policy(_context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    costly = re.match(r"fla_dist\.(?!short_convolution|swiglu)", str(op)) or op in ATTENTION
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.MUST_RECOMPUTE


def _both(outer: Contexts, inner: Contexts) -> Contexts:
    """The forward's and the recomputation's contexts, each one inside the other."""
    return _nested(outer[0], inner[0]), _nested(outer[1], inner[1])


@contextmanager
def _nested(
    outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]
) -> Iterator[None]:
    with outer, inner:
        yield
