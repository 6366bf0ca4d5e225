"""The language model: embed, blocks, norm, head with its loss.

    embed -> [norm, mixer, norm, mlp] x num_hidden_layers -> norm -> head

Every mixer family, hybrids of them included, is this module with another layer pattern. The slice
of a sequence that a rank holds goes through it as any sequence would; only the mixers' `Stream`
reaches other ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla_dist.kernels.linear_cross_entropy import linear_cross_entropy
from fla_dist.models.block import ActivationCheckpointing, Block
from fla_dist.models.initialization import initialize
from fla_dist.models.layers import RMSNorm
from fla_dist.models.mixers import MIXERS, Mixer
from fla_dist.models.stream import CachedStream, Stream
from fla_dist.parallel.exchange import build_exchange
from fla_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from fla_dist.config import ModelConfig


class TokenSlice(Protocol):
    """This rank's slice of a micro batch, [B, T] each (fla_dist.data.batch.Batch)."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def doc_ids(self) -> Tensor: ...
    @property
    def slice_lengths(self) -> tuple[int, ...] | None: ...


class LanguageModel(nn.Module):
    """A decoder-only language model; see the module's head.

    Args:
        config: its sizes and layer pattern.
        mesh: the ranks that sequences are divided over; None for one process.
        activation_checkpointing: what of a block is kept for the backward (block.py).
        loss_chunks: parts into which the loss cuts the tokens, so that logits never exist in whole.
        z_loss: weight of the squared log-normalizer in the loss.
        compiled: training runs the blocks through torch.compile (block.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: Mesh | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        loss_chunks: int | Literal["auto"] = "auto",
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.exchange = build_exchange(mesh)
        self.loss_chunks = None if loss_chunks == "auto" else loss_chunks
        self.z_loss = z_loss
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            name = config.layer_pattern[index % len(config.layer_pattern)]
            mixer = MIXERS[name](config.hidden_size, config.mixers[name], config.norm_eps)
            mixer.layer_index, mixer.num_layers = index, config.num_hidden_layers
            self.blocks.append(
                Block(
                    config.hidden_size,
                    config.intermediate_size,
                    mixer,
                    config.norm_eps,
                    activation_checkpointing,
                    compiled,
                )
            )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, batch: TokenSlice) -> Tensor:
        """The sum of the token losses over this slice's labels that are not -100; a scalar in
        fp32."""
        exchange = self.exchange.of_lengths(batch.slice_lengths)
        stream = Stream(batch.positions, batch.doc_ids, exchange)
        for mixer in self.mixers():
            mixer.prepare(stream)
        x = self.embedding(batch.tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, stream.with_exchange(exchange.of_layer(index)))
        return linear_cross_entropy(
            self.norm(x).flatten(0, 1),
            self.head.weight,
            batch.labels.flatten(),
            z_loss=self.z_loss,
            chunks=self.loss_chunks,
        )

    def mixers(self) -> Iterator[Mixer]:
        """The blocks' mixers, in order."""
        return (module for module in self.modules() if isinstance(module, Mixer))

    def initialize(self, seed: int) -> None:
        """Sets every parameter from `seed`, the same on every rank (initialization.py)."""
        initialize(self, seed)

    @torch.no_grad()
    def next_logits(
        self, tokens: Tensor, positions: Tensor, caches: list[dict[str, Tensor]]
    ) -> Tensor:
        """Logits [B, vocabulary] after the last of `tokens` [B, T], whose past is in `caches`, one
        a block."""
        x = self.embedding(tokens)
        shared: dict[Hashable, Any] = {}
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, CachedStream(positions, cache, shared))
        return self.head(self.norm(x[:, -1])).float()

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues `tokens` [B, T] in the recurrent form: memory does not grow, but for full
        attention's cache.

        Args:
            temperature: 0 takes the likeliest token.
            top_p: samples from the likeliest tokens that together have this probability.

        Returns:
            [B, T + max_new_tokens].
        """
        training = self.training
        self.eval()
        caches: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        new = tokens
        for _ in range(max_new_tokens):
            logits = self.next_logits(new, positions, caches)
            new = sample(logits, temperature, top_p, generator)
            tokens = torch.cat([tokens, new], dim=1)
            positions = positions[:, -1:] + 1
        self.train(training)
        return tokens

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of forward and backward a token: twice the forward's again, each mixer by its own
        rule."""
        products = sum(
            module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear)
        )
        mixing = sum(mixer.flops_per_token(sequence_length) for mixer in self.mixers())
        return 3 * (2 * products + mixing)


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token a row of `logits` [B, vocabulary]; [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities, order = F.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))
