"""One block, [norm, mixer, norm, mlp] around the residual stream, and what of it is kept for the
backward."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fla_dist.models.layers import RMSNorm, SwiGLU
from fla_dist.models.mixers import Mixer
from fla_dist.models.stream import Stream
from fla_dist.parallel.exchange import ReplayedExchange

ActivationCheckpointing = Literal["none", "selective", "full"]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Activation checkpointing: `selective` keeps the mixer's activations and the MLP's matrix
        products, and
    recomputes the MLP's pointwise work; `full` keeps the block's input and what came from other
    ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        mixer: Mixer,
        norm_eps: float,
        activation_checkpointing: ActivationCheckpointing,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(hidden_size, norm_eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self._mlp(self._mixer(x, stream))
        if self.activation_checkpointing == "full":
            replayed = ReplayedExchange(stream.exchange)
            return checkpoint(
                self._whole,
                x,
                stream.with_exchange(replayed),
                use_reentrant=False,
                context_fn=replayed.contexts,
            )
        x = self._mixer(x, stream)
        if self.activation_checkpointing == "selective":
            keep_products = partial(create_selective_checkpoint_contexts, _policy)
            return checkpoint(self._mlp, x, use_reentrant=False, context_fn=keep_products)
        return self._mlp(x)

    def _whole(self, x: Tensor, stream: Stream) -> Tensor:
        return self._mlp(self._mixer(x, stream))

    def _mixer(self, x: Tensor, stream: Stream) -> Tensor:
        return x + self.mixer(self.mixer_norm(x), stream)

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))


def _policy(_context, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE
