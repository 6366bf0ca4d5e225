"""Full softmax attention across ranks, in three ways.

- `all_gather`: every rank receives the keys and values of the ranks before it, a group of heads
  after the other, so that memory holds those of one group;
- `all_to_all` (Ulysses, arXiv:2309.14509): tokens are exchanged for heads, and each rank attends
  over the whole sequence with its share of the heads;
- `ring` (arXiv:2310.01889): keys and values travel from rank to rank while each attends to those
  that it holds; the parts are joined by their log-sum-exp.

In all of them the backward fetches keys and values again: what is kept of a layer is no larger than
the slice. Documents are told by the positions of the queries, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from fla_dist.kernels.attention import AttentionMask
from fla_dist.kernels.attention.stretch import Stretch, attend, attend_backward, join, stretch
from fla_dist.parallel.collectives import (
    Steps,
    Transfer,
    all_gather,
    all_to_all,
    exchange,
    reduce_scatter,
    send_and_receive,
)
from fla_dist.parallel.mesh import AttentionExchange, Mesh
from fla_dist.parallel.slices import Slices

GATHERED_BYTES = 1 << 30
"""Keys and values that an all-gather of one group of heads may bring at most, if heads allow."""
RING_TOKENS = 8192
"""Tokens of a slice from which a ring's transfers hide: a slice's scores cost 4 T² H K FLOPs, at
4e14 FLOP/s; its keys and values are 4 T G K bytes, at 5e10 bytes/s across hosts: T = 8192 G / H."""


class Masks(Protocol):
    """What the layers of a batch share (fla_dist.models.stream.Stream)."""

    positions: Tensor

    def attention_mask(self, window: int | None, context: int) -> AttentionMask: ...

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any: ...


def choose(mesh: Mesh, heads: int, kv_heads: int, length: int) -> AttentionExchange:
    """The exchange of a layer: inside a host an all-to-all where the ranks share out the heads;
    across hosts a ring where slices are long enough to hide it; an all-gather elsewhere."""
    if mesh.attention_exchange is not None:
        return mesh.attention_exchange
    size = mesh.sequence_parallel_size
    if not mesh.spans_hosts and heads % size == 0 and kv_heads % size == 0:
        return "all_to_all"
    if mesh.spans_hosts and length * heads >= RING_TOKENS * kv_heads:
        return "ring"
    return "all_gather"


def attention_way(heads: int, kv_heads: int, slices: Slices, masks: Masks) -> Way:
    """How the ranks of `slices` attend.

    Raises:
        ValueError: the exchange that was asked for does not fit the heads.
    """
    positions, size = masks.positions, slices.size
    length = positions.shape[1]
    lengths = slices.lengths_beside(length)
    name = choose(slices.mesh, heads, kv_heads, max(lengths))
    if name == "all_to_all":
        if heads % size or kv_heads % size:
            raise ValueError(
                f"parallelism.attention_exchange is 'all_to_all', expected {size} ranks to share "
                f"out the {heads} heads and {kv_heads} key-value heads evenly"
            )

        def whole_sequence() -> Stretch:
            steps = _gather_tokens(positions, slices)
            whole = exchange(steps, slices, "positions, forward")
            return stretch(whole, 0, whole.shape[1])

        return _AllToAll(slices, masks.once("the whole sequence", whole_sequence))

    def of(start: int, count: int) -> Stretch:
        return masks.once(("stretch", start, count), lambda: stretch(positions, start, count))

    before = sum(lengths[: slices.rank])
    if name == "all_gather":
        past = [of(-before, before)] if before else []
        return _AllGather(slices, [*past, of(0, length)])
    starts = [sum(lengths[:rank]) - before for rank in range(slices.rank + 1)]
    return _Ring(slices, [of(*place) for place in zip(starts, lengths, strict=False)])


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, way: Way, kept: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention to all tokens of the sequence that share the query's document.

    Args:
        q: [B, T, H, K], this rank's slice.      k, v: [B, T, G, K]; H is a multiple of G.
        kept: what an earlier call with the same values returned: under recomputation, nothing is
            sent or computed again before the backward.

    Returns:
        o [B, T, H, K], and what the backward needs beside it.
    """
    return _FullAttention.apply(q, k, v, way, *(kept or (None, None)))


class Way(Protocol):
    """One of the three ways, for one layer and batch."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o, and what the backward needs of the scores' log-sum-exp."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _FullAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, way, o, lse):
        if o is None:
            o, lse = way.forward(q, k, v)
        else:
            o, lse = o.view_as(o), lse.view_as(lse)
        ctx.way = way
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        return *ctx.way.backward(*ctx.saved_tensors, do), None, None, None


def _join_all(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to several stretches from attention to each; o in the log-sum-exp's dtype."""
    return reduce(
        lambda whole, part: join(*whole, *part), ((o.to(lse.dtype), lse) for o, lse in parts)
    )


# All-gather ---------------------------------------------------------------------------------------


class _AllGather:
    def __init__(self, slices: Slices, seen: list[Stretch]) -> None:
        self._slices, self._seen = slices, seen  # the tokens before the slice, and the slice

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for heads, kv_heads in self._groups(q, k):
            held = self._all(k, v, kv_heads, "forward")
            parts.append(_join_all(attend(q[:, :, heads], *kv, seen) for seen, kv in held))
        o, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return o.to(q.dtype), lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = []
        for heads, kv_heads in self._groups(q, k):
            whole = [x[:, :, heads] for x in (o, lse, do)]
            shares = [
                attend_backward(q[:, :, heads], *kv, *whole, seen)
                for seen, kv in self._all(k, v, kv_heads, "backward")
            ]
            dq = torch.stack([share[0] for share in shares]).sum(dim=0, dtype=lse.dtype).to(q.dtype)
            dk, dv = (torch.cat([share[i] for share in shares], dim=1) for i in (1, 2))
            steps = _scatter_tokens(torch.stack([dk, dv], dim=2), q.shape[1], self._slices)
            dkv = exchange(steps, self._slices, "gradients of keys and values, backward")
            gradients.append((dq, *dkv.to(k.dtype).unbind(dim=2)))
        dq, dk, dv = (torch.cat(parts, dim=2) for parts in zip(*gradients, strict=True))
        return dq, dk, dv

    def _all(
        self, k: Tensor, v: Tensor, heads: slice, direction: str
    ) -> list[tuple[Stretch, list[Tensor]]]:
        """What this slice sees, with its keys and values of some heads."""
        own = torch.stack([k[:, :, heads], v[:, :, heads]], dim=2)
        steps = _gather_tokens(own, self._slices)
        whole = exchange(steps, self._slices, f"keys and values, {direction}")
        counts = [seen.count for seen in self._seen]
        parts = whole[:, : sum(counts)].split(counts, dim=1)
        return [(seen, [*x.unbind(dim=2)]) for seen, x in zip(self._seen, parts, strict=True)]

    def _groups(self, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """Heads of queries, and of keys, of each group."""
        kv_heads, repeats = k.shape[2], q.shape[2] // k.shape[2]
        a_head = 2 * k[:, :, 0].numel() * k.element_size() * self._slices.size
        step = max(1, min(kv_heads, GATHERED_BYTES // a_head))
        return [
            (slice(i * repeats, (i + step) * repeats), slice(i, i + step))
            for i in range(0, kv_heads, step)
        ]


def _gather_tokens(x: Tensor, slices: Slices) -> Steps:
    """[B, T of all ranks, ...] from x [B, T, ...]."""
    lengths = slices.lengths_beside(x.shape[1])
    longest = max(lengths)
    message = x.new_zeros(longest, x.shape[0], *x.shape[2:])
    message[: x.shape[1]] = x.transpose(0, 1)
    gathered = message.new_empty(slices.size, *message.shape)
    group = slices.mesh.sequence_group
    yield [all_gather(gathered.view(-1), message.view(-1), group=group, async_op=True)]
    whole = torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
    return whole.transpose(0, 1)


def _scatter_tokens(gradient: Tensor, length: int, slices: Slices) -> Steps:
    """This slice's gradient [B, T, ...], summed over the ranks, from `gradient`, of the tokens from
    the sequence's start to the end of this slice."""
    lengths = slices.lengths_beside(length)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    shape = (max(lengths), gradient.shape[0], *gradient.shape[2:])
    message = gradient.new_zeros(slices.size, *shape, dtype=dtype)
    parts = gradient.transpose(0, 1).split(lengths[: slices.rank + 1])
    for place, part in zip(message, parts, strict=False):
        place[: part.shape[0]] = part
    own = message.new_empty(shape)
    group = slices.mesh.sequence_group
    yield [reduce_scatter(own.view(-1), message.view(-1), group=group, async_op=True)]
    return own[:length].transpose(0, 1).to(gradient.dtype)


# All-to-all ---------------------------------------------------------------------------------------


class _AllToAll:
    def __init__(self, slices: Slices, whole: Stretch) -> None:
        self._slices, self._whole = slices, whole

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (self._to_heads(x, "forward") for x in (q, k, v))
        o, lse = attend(q, k, v, self._whole)
        return self._to_tokens(o.to(q.dtype), "forward"), lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, do = (self._to_heads(x, "backward") for x in (q, k, v, o, do))
        gradients = attend_backward(q, k, v, o, lse, do, self._whole)
        dq, dk, dv = (self._to_tokens(x.to(q.dtype), "backward") for x in gradients)
        return dq, dk, dv

    def _to_heads(self, x: Tensor, direction: str) -> Tensor:
        """[B, T of all ranks, H / P, K] from x [B, T, H, K]."""
        steps = _tokens_to_heads(x, self._slices)
        return exchange(steps, self._slices, f"tokens to heads, {direction}")

    def _to_tokens(self, x: Tensor, direction: str) -> Tensor:
        """Back again."""
        length = self._own_length(x.shape[1])
        steps = _heads_to_tokens(x, self._slices.lengths_beside(length), self._slices)
        return exchange(steps, self._slices, f"heads to tokens, {direction}")

    def _own_length(self, whole: int) -> int:
        lengths = self._slices.lengths
        return lengths[self._slices.rank] if lengths else whole // self._slices.size


def _tokens_to_heads(x: Tensor, slices: Slices) -> Steps:
    batch, length, _, size = x.shape
    lengths = slices.lengths_beside(length)
    message = x.unflatten(2, (slices.size, -1)).permute(2, 1, 0, 3, 4).contiguous()
    shape = message.shape[2:]  # [P, T, B, H / P, K]
    received = message.new_empty(sum(lengths), *shape)
    yield [
        all_to_all(
            received,
            message.flatten(0, 1),
            output_split_sizes=list(lengths),
            input_split_sizes=[length] * slices.size,
            group=slices.mesh.sequence_group,
            async_op=True,
        )
    ]
    return received.transpose(0, 1)


def _heads_to_tokens(x: Tensor, lengths: tuple[int, ...], slices: Slices) -> Steps:
    message = x.transpose(0, 1).contiguous()  # [T of all ranks, B, H / P, K]
    own = lengths[slices.rank]
    received = message.new_empty(slices.size * own, *message.shape[1:])
    yield [
        all_to_all(
            received,
            message,
            output_split_sizes=[own] * slices.size,
            input_split_sizes=list(lengths),
            group=slices.mesh.sequence_group,
            async_op=True,
        )
    ]
    return received.unflatten(0, (slices.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


# Ring ---------------------------------------------------------------------------------------------


class _Ring:
    """Keys and values move to the right only, since no rank sees those after it: after `hop` steps
    a rank holds those of the rank `hop` places to its left."""

    def __init__(self, slices: Slices, seen: list[Stretch]) -> None:
        self._slices, self._seen = slices, seen  # the slices up to this rank's

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        hops = self._hops(k, v, "forward")
        o, lse = _join_all(attend(q, keys, values, seen) for seen, keys, values in hops)
        return o.to(q.dtype), lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq = torch.zeros_like(q, dtype=lse.dtype)
        dkv = k.new_zeros(2, *k.shape, dtype=lse.dtype)
        hops = self._hops(k, v, "backward")
        for hop in range(self._slices.size):
            part = None
            if hop <= self._slices.rank:
                seen, keys, values = next(hops)
                gradients = attend_backward(q, keys, values, o, lse, do, seen)
                dq += gradients[0]
                part = torch.stack(gradients[1:]).to(k.dtype)
            steps = self._to_owner(part, torch.zeros_like(dkv, dtype=k.dtype), hop)
            phase = f"gradients of keys and values {hop}, backward"
            dkv += exchange(steps, self._slices, phase)
        assert next(hops, None) is None  # ends the last sending
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)

    def _hops(
        self, k: Tensor, v: Tensor, direction: str
    ) -> Iterator[tuple[Stretch, Tensor, Tensor]]:
        """The slice that is held with its keys and values; the next are under way meanwhile."""
        rank = self._slices.rank
        held = torch.stack([k, v])
        for hop in range(rank + 1):
            phase = f"keys and values {hop + 1}, {direction}"
            transfer = Transfer(self._pass_on(held, hop), self._slices, phase, held.device)
            yield self._seen[rank - hop], held[0], held[1]
            held = transfer.wait()

    def _pass_on(self, held: Tensor, hop: int) -> Steps:
        rank, here = self._slices.rank, self._slices.mesh.rank
        sends = [(held, here + 1)] if rank + 1 < self._slices.size else []
        coming = self._seen[rank - hop - 1].count if hop < rank else 0
        received = held.new_empty(2, held.shape[1], coming, *held.shape[3:])
        receives = [(received, here - 1)] if hop < rank else []
        yield send_and_receive(sends, receives, self._slices.mesh.sequence_group)
        return received

    def _to_owner(self, part: Tensor | None, received: Tensor, hop: int) -> Steps:
        """Sends what this rank found for the slice `hop` places to its left; receives what the
        rank as far to its right found for this one."""
        if hop == 0:
            assert part is not None
            return part
        here = self._slices.mesh.rank
        sends = [] if part is None else [(part, here - hop)]
        receives = [(received, here + hop)] if self._slices.rank + hop < self._slices.size else []
        yield send_and_receive(sends, receives, self._slices.mesh.sequence_group)
        return received
