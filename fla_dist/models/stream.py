"""What a mixer knows of its tokens beyond their vectors: where documents start, and what came
before the slice.

In training what came before lies on other ranks; in generation it lies in a cache. A mixer asks the
stream and does not see which.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fla_dist.kernels.attention import AttentionMask, attention, attention_mask
from fla_dist.kernels.state import Scan
from fla_dist.parallel.exchange import Exchange, LocalExchange
from fla_dist.parallel.halo import Arrived, PendingHalo, behind

Made = TypeVar("Made")


class Stream:
    """The tokens of one slice.

    Attributes:
        positions: [B, T] integer, each token's position in its document.
        doc_ids: [B, T] int32, 0 for the document that was open before the slice, rising by one
            where one starts.
        scan: joins recurrent states.
    """

    def __init__(self, positions: Tensor, doc_ids: Tensor, exchange: Exchange) -> None:
        self.positions = positions
        self.doc_ids = doc_ids
        self.scan: Scan = exchange.scan
        self.exchange = exchange
        self._shared: dict[Hashable, Any] = {}

    def with_exchange(self, exchange: Exchange) -> Stream:
        stream = Stream(self.positions, self.doc_ids, exchange)
        stream._shared = self._shared
        return stream

    def share(self, name: str, x: Tensor) -> Tensor:
        """What the first of the model's layers that shares under this name gave: x itself in that
        layer."""
        return self._shared.setdefault(name, x)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made by the first of the model's layers that asks for `key`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def attention_mask(self, window: int | None, context: int) -> AttentionMask:
        """What the tokens see of themselves and of `context` tokens before them."""
        return self.once(
            ("attention mask", window, context),
            lambda: attention_mask(self.positions, context=context, window=window),
        )

    def context(self, width: int) -> int:
        """How many of the `width` tokens before the slice there are."""
        return min(width, self.exchange.tokens_before(self.positions.shape[1]))

    def before(self, name: str, x: Tensor, width: int) -> PendingHalo:
        """The `width` tokens before x [B, T, ...], zeros where there were none; on their way while
        what needs none of them is computed. Every rank must use what they give.

        `name` tells the contexts of one mixer apart.
        """
        return self.exchange.before(x, width)

    def with_halo(self, name: str, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        """Each of `xs` [B, T, ...] behind the `context(width)` tokens before it; who uses them must
        leave their gradients to them alone."""
        return self.exchange.with_halo(xs, width)

    def full_attention(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of q [B, T, H, K] to k and v [B, T, G, K] and to all that came before,
        inside documents; [B, T, H, K]."""
        return self.exchange.attention(q, k, v, self)

    def initial_state(self, name: str) -> Tensor | None:
        """The recurrent state before the first token of the sequence."""
        return None

    def keep_state(self, name: str, state: Tensor) -> None:
        """Tells the recurrent state after the last token of the slice."""


class CachedStream(Stream):
    """The next tokens of a sequence whose past is in `cache`, a mixer's own; constant memory except
    for full attention. `shared` is that of all layers at these tokens."""

    def __init__(
        self, positions: Tensor, cache: dict[str, Tensor], shared: dict[Hashable, Any]
    ) -> None:
        doc_ids = (positions == 0).cumsum(dim=1).to(torch.int32)
        super().__init__(positions, doc_ids, LocalExchange())
        self._cache = cache
        self._shared = shared

    def context(self, width: int) -> int:
        return width

    def before(self, name: str, x: Tensor, width: int) -> Arrived:
        past = self._cache.get(name)
        if past is None:
            past = self.exchange.before(x, width).wait()
        whole = torch.cat([past, x], dim=1)
        self._cache[name] = whole[:, whole.shape[1] - width :]
        return Arrived(past)

    def with_halo(self, name: str, xs: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
        return behind(self.before(name, torch.stack(xs, dim=2), width).wait(), xs)

    def full_attention(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = torch.stack([k, v], dim=2)
        if name in self._cache:
            kv = torch.cat([self._cache[name], kv], dim=1)
        self._cache[name] = kv
        mask = self.attention_mask(None, kv.shape[1] - q.shape[1])
        return attention(q, *kv.unbind(dim=2), mask)

    def initial_state(self, name: str) -> Tensor | None:
        return self._cache.get(name)

    def keep_state(self, name: str, state: Tensor) -> None:
        self._cache[name] = state
