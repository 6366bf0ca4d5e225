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

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fla_dist.kernels.attention import AttentionMask, attention, attention_mask
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
QUERY_BLOCK, KEY_BLOCK = 512, 4096
"""A tile of scores of the ring."""


class Masks(Protocol):
    """What the layers of a batch share (fla_dist.models.stream.Stream)."""

    positions: Tensor

    def attention_mask(self, window: int | None, context: int) -> AttentionMask: ...


class WholeMask:
    """The mask of a whole sequence on every rank, made at a batch's first layer."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, AttentionMask] | None = None

    def of(self, positions: Tensor, slices: Slices) -> AttentionMask:
        if self._made is None or self._made[0] is not positions:
            steps = _gather_tokens(positions, slices)
            whole = exchange(steps, slices, "positions, forward")
            self._made = positions, attention_mask(whole, window=None)
        return self._made[1]


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


def attention_way(heads: int, kv_heads: int, slices: Slices, masks: Masks, whole: WholeMask) -> Way:
    """How the ranks of `slices` attend.

    Raises:
        ValueError: the exchange that was asked for does not fit the heads.
    """
    positions, size = masks.positions, slices.size
    lengths = slices.lengths_beside(positions.shape[1])
    name = choose(slices.mesh, heads, kv_heads, max(lengths))
    if name == "ring":
        return _Ring(slices, positions)
    if name == "all_gather":
        return _AllGather(slices, masks.attention_mask(None, sum(lengths[: slices.rank])))
    if heads % size or kv_heads % size:
        raise ValueError(
            f"parallelism.attention_exchange is 'all_to_all', expected {size} ranks to share out "
            f"the {heads} heads and {kv_heads} key-value heads evenly"
        )
    return _AllToAll(slices, whole.of(positions, slices))


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
        """o, and the log-sum-exp where the backward uses it."""

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


def _with_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, do: Tensor
) -> tuple[Tensor, ...]:
    """dq, dk, dv of `attention`."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        o = attention(*inputs, mask)
    return torch.autograd.grad(o, inputs, do)


# All-gather ---------------------------------------------------------------------------------------


class _AllGather:
    def __init__(self, slices: Slices, mask: AttentionMask) -> None:
        self._slices, self._mask = slices, mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [
            attention(q[:, :, heads], *self._all(k, v, kv_heads, "forward"), self._mask)
            for heads, kv_heads in self._groups(q, k)
        ]
        return torch.cat(outputs, dim=2), q.new_empty(0)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = []
        for heads, kv_heads in self._groups(q, k):
            keys, values = self._all(k, v, kv_heads, "backward")
            dq, dk, dv = _with_gradients(q[:, :, heads], keys, values, self._mask, do[:, :, heads])
            steps = _scatter_tokens(torch.stack([dk, dv], dim=2), q.shape[1], self._slices)
            dkv = exchange(steps, self._slices, "gradients of keys and values, backward")
            gradients.append((dq, *dkv.unbind(dim=2)))
        dq, dk, dv = (torch.cat(parts, dim=2) for parts in zip(*gradients, strict=True))
        return dq, dk, dv

    def _all(self, k: Tensor, v: Tensor, heads: slice, direction: str) -> Iterator[Tensor]:
        """Keys and values of some heads from the sequence's start to the end of this slice."""
        own = torch.stack([k[:, :, heads], v[:, :, heads]], dim=2)
        steps = _gather_tokens(own, self._slices)
        whole = exchange(steps, self._slices, f"keys and values, {direction}")
        return iter(whole[:, : self._mask.context + k.shape[1]].unbind(dim=2))

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
    def __init__(self, slices: Slices, mask: AttentionMask) -> None:
        self._slices, self._mask = slices, mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (self._to_heads(x, "forward") for x in (q, k, v))
        return self._to_tokens(attention(q, k, v, self._mask), "forward"), q.new_empty(0)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, do = (self._to_heads(x, "backward") for x in (q, k, v, do))
        gradients = _with_gradients(q, k, v, self._mask, do)
        dq, dk, dv = (self._to_tokens(x, "backward") for x in gradients)
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

    def __init__(self, slices: Slices, positions: Tensor) -> None:
        self._slices = slices
        lengths = slices.lengths_beside(positions.shape[1])
        self._lengths = lengths
        self._starts = [sum(lengths[:rank]) for rank in range(slices.size)]
        tokens = torch.arange(positions.shape[1], device=positions.device)
        self._first = tokens - positions  # first key seen, counted from this slice's start

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        o = torch.zeros_like(q, dtype=dtype)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
        for offset, keys, values in self._hops(k, v, "forward"):
            for queries, tile, seen in self._tiles(q, keys, offset):
                part = attend(q[:, queries], keys[:, tile], values[:, tile], seen)
                o[:, queries], lse[:, queries] = join(o[:, queries], lse[:, queries], *part)
        return o.to(q.dtype), lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = lse.dtype
        delta = (do.to(dtype) * o.to(dtype)).sum(dim=-1)
        dq = torch.zeros_like(q, dtype=dtype)
        dkv = k.new_zeros(2, *k.shape, dtype=dtype)
        hops = self._hops(k, v, "backward")
        for hop in range(self._slices.size):
            part = None
            if hop <= self._slices.rank:
                offset, keys, values = next(hops)
                part = k.new_zeros(2, *keys.shape, dtype=dtype)
                for queries, tile, seen in self._tiles(q, keys, offset):
                    gradients = attend_backward(
                        q[:, queries], keys[:, tile], values[:, tile], seen,
                        lse[:, queries], delta[:, queries], do[:, queries],
                    )  # fmt: skip
                    dq[:, queries] += gradients[0]
                    part[0][:, tile] += gradients[1]
                    part[1][:, tile] += gradients[2]
            steps = self._to_owner(part, torch.zeros_like(dkv), hop)
            phase = f"gradients of keys and values {hop}, backward"
            dkv += exchange(steps, self._slices, phase)
        assert next(hops, None) is None  # ends the last sending
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)

    def _hops(self, k: Tensor, v: Tensor, direction: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where the held keys start, counted from this slice's start, with keys and values; the
        next are under way meanwhile."""
        rank = self._slices.rank
        held = torch.stack([k, v])
        for hop in range(rank + 1):
            phase = f"keys and values {hop + 1}, {direction}"
            transfer = Transfer(self._pass_on(held, hop), self._slices, phase, held.device)
            yield self._starts[rank - hop] - self._starts[rank], held[0], held[1]
            held = transfer.wait()

    def _pass_on(self, held: Tensor, hop: int) -> Steps:
        rank, here = self._slices.rank, self._slices.mesh.rank
        sends = [(held, here + 1)] if rank + 1 < self._slices.size else []
        coming = self._lengths[rank - hop - 1] if hop < rank else 0
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

    def _tiles(self, q: Tensor, keys: Tensor, offset: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries, keys and [B, queries, keys] of who sees whom; no tile that is after all its
        queries."""
        length, count = q.shape[1], keys.shape[1]
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            query = torch.arange(start, stop, device=q.device)[:, None]
            for low in range(0, min(count, stop - offset), KEY_BLOCK):
                high = min(low + KEY_BLOCK, count)
                key = torch.arange(low + offset, high + offset, device=q.device)
                seen = (key <= query) & (key >= self._first[:, start:stop, None])
                yield slice(start, stop), slice(low, high), seen


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, with the log-sum-exp of their scores, in fp32 or fp64.

    Args:
        q: [B, T, H, K].      k, v: [B, S, G, K].      seen: [B, T, S] bool.

    Returns:
        o [B, T, H, K], 0 where a query sees no key; lse [B, T, H], -inf there.
    """
    scores, (_, _, v) = _scores(q, k, v, seen)
    lse = scores.logsumexp(dim=-1)  # [B, G, R, T]
    weights = _weights(scores, lse)
    o = torch.einsum("bgrts,bsgk->btgrk", weights, v)
    return o.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def join(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from attention to each."""
    whole = torch.logaddexp(lse, other_lse)
    share, other = (
        (part - whole).masked_fill(part == -torch.inf, -torch.inf).exp()[..., None]
        for part in (lse, other_lse)
    )
    return share * o + other * other_o, whole


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, lse: Tensor, delta: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What some of the keys give to dq, dk and dv (arXiv:2205.14135, algorithm 4).

    Args:
        lse: [B, T, H], over all keys that a query sees.
        delta: [B, T, H], Σ_k do ⊙ o.
    """
    scores, (q, k, v) = _scores(q, k, v, seen)
    lse, delta, do = (
        x.to(scores.dtype).unflatten(2, (k.shape[2], -1)) for x in (lse, delta, do)
    )  # [B, T, G, R, (K)]
    weights = _weights(scores, lse.permute(0, 2, 3, 1))
    dv = torch.einsum("bgrts,btgrk->bsgk", weights, do)
    dweights = torch.einsum("btgrk,bsgk->bgrts", do, v)
    dscores = weights * (dweights - delta.permute(0, 2, 3, 1)[..., None]) * q.shape[-1] ** -0.5
    dq = torch.einsum("bgrts,bsgk->btgrk", dscores, k)
    dk = torch.einsum("bgrts,btgrk->bsgk", dscores, q)
    return dq.flatten(2, 3), dk, dv


def _scores(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """[B, G, R, T, S], -inf where a key is not seen; q [B, T, G, R, K], k and v in their dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btgrk,bsgk->bgrts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen[:, None, None], -torch.inf), (q, k, v)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 where no key is seen."""
    return (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
