"""Attention of a slice's queries to a stretch of the sequence's keys: forward with the log-sum-exp
that joins stretches, and backward from the output and log-sum-exp over all of them. What a slice of
a divided sequence needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.launch import capability
from fla_dist.kernels.common.precision import without_autocast

QUERY_BLOCK, KEY_BLOCK = 512, 4096
"""A tile of scores in plain PyTorch."""


@dataclass(frozen=True)
class Stretch:
    """Keys that are the slice's own, or a stretch of the sequence before it.

    Attributes:
        first: [B, T], the first key of each query's document; this and `start` count from the
            slice's first token.
        start: the stretch's first token.
        count: its tokens.
        hidden: whether a query does not see keys of it because of its document; told on a GPU.
        segments: [N + 1] int32 each, ends of the queries' and the keys' documents in rows of T and
            of `count` tokens laid end to end, for flash attention; on a GPU.
    """

    first: Tensor
    start: int
    count: int
    hidden: bool = True
    segments: tuple[Tensor, Tensor] | None = None

    @property
    def own(self) -> bool:
        """Whether the keys are the slice's own, seen from their own token on."""
        return self.start == 0


def stretch(positions: Tensor, start: int, count: int) -> Stretch:
    """The `count` keys from token `start`, counted from the slice's first token; on a GPU it waits
    for `positions`.

    Args:
        positions: [B, T] integer, each token's position in its document.
    """
    length = positions.shape[1]
    assert start + count <= 0 or (start, count) == (0, length)
    first = torch.arange(length, device=positions.device) - positions
    if not positions.is_cuda:
        return Stretch(first, start, count)
    hidden = bool((first > start).any())
    return Stretch(first, start, count, hidden, document_segments(positions, start, count))


def document_segments(positions: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """The segments of a `Stretch`. A stretch before the slice has three a row: the keys before the
    document that was open at the slice's start, that document, and the queries after it."""
    batch, length = positions.shape
    if start == 0:
        starts = positions == 0
        starts[:, 0] = True
        ends = F.pad(starts.flatten().nonzero()[:, 0].to(torch.int32), (0, 1), value=starts.numel())
        return ends, ends
    row = torch.arange(batch, device=positions.device)
    opened = (-positions[:, 0] - start).clamp(0, count)  # the first key that the first query sees
    starts = F.pad(positions[:, 1:] == 0, (0, 1), value=True)
    ended = starts.to(torch.int8).argmax(dim=1) + 1  # tokens of the document that was open
    queries = torch.stack([row * length, row * length, row * length + ended], dim=1)
    keys = torch.stack([row * count, row * count + opened, (row + 1) * count], dim=1)
    return (
        F.pad(queries.flatten().to(torch.int32), (0, 1), value=batch * length),
        F.pad(keys.flatten().to(torch.int32), (0, 1), value=batch * count),
    )


@without_autocast
def attend(q: Tensor, k: Tensor, v: Tensor, to: Stretch) -> tuple[Tensor, Tensor]:
    """Softmax attention to the keys of a stretch that a query sees: those from first_t to its own.

    Args:
        q: [B, T, H, K].      k, v: [B, `to.count`, G, K]; H is a multiple of G.

    Returns:
        o [B, T, H, K], 0 where a query sees no key, in q's dtype or in that of the scores'
        log-sum-exp [B, T, H], which is fp32 or fp64; it is -inf there.
    """
    if _by_cudnn(q, to):
        outputs = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *_turned(q, k, v), None, True, 0.0, to.own
        )
        return outputs[0].transpose(1, 2), outputs[1].view(outputs[1].shape[:3]).transpose(1, 2)
    if _by_flash(q, to):
        outputs = torch.ops.aten._flash_attention_forward(
            *_rows(q, k, v), *_lengths(q, to), 0.0, to.own, False
        )
        lse = outputs[1].unflatten(1, q.shape[:2]).permute(1, 2, 0)
        return outputs[0].view_as(q), lse.masked_fill(lse == torch.inf, -torch.inf)
    dtype = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros_like(q, dtype=dtype)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for queries, keys, seen in _tiles(to):
        part = _attend(q[:, queries], k[:, keys], v[:, keys], seen)
        o[:, queries], lse[:, queries] = join(o[:, queries], lse[:, queries], *part)
    return o, lse


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, to: Stretch
) -> tuple[Tensor, Tensor, Tensor]:
    """What the keys of a stretch give to dq, dk and dv (arXiv:2205.14135, algorithm 4), in q's
    dtype or lse's.

    Args:
        o, lse: over all keys that a query sees, in this stretch or not.
    """
    if _by_cudnn(q, to):
        nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's random numbers
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *_turned(do, q, k, v, o), lse.transpose(1, 2).contiguous().unsqueeze(-1),
            nothing, nothing, None, None, None, q.shape[1], to.count, 0.0, to.own,
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in gradients)
    if _by_flash(q, to):
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)
        gradients = torch.ops.aten._flash_attention_backward(
            *_rows(do, q, k, v, o), lse.permute(2, 0, 1).flatten(1).contiguous(),
            *_lengths(q, to), 0.0, to.own, nothing, nothing,
        )  # fmt: skip
        return tuple(x.view_as(y) for x, y in zip(gradients, (q, k, v), strict=True))
    dtype = lse.dtype
    delta = (do.to(dtype) * o.to(dtype)).sum(dim=-1)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for queries, keys, seen in _tiles(to):
        gradients = _attend_backward(
            q[:, queries], k[:, keys], v[:, keys], seen,
            lse[:, queries], delta[:, queries], do[:, queries],
        )  # fmt: skip
        dq[:, queries] += gradients[0]
        dk[:, keys] += gradients[1]
        dv[:, keys] += gradients[2]
    return dq, dk, dv


def join(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from attention to each."""
    whole = torch.logaddexp(lse, other_lse)
    share, other = (
        (part - whole).masked_fill(part == -torch.inf, -torch.inf).exp()[..., None]
        for part in (lse, other_lse)
    )
    return share * o + other * other_o, whole


def _by_flash(q: Tensor, to: Stretch) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return to.segments is not None and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _by_cudnn(q: Tensor, to: Stretch) -> bool:
    """On Hopper it is nearly twice as fast as flash attention, but knows no documents."""
    fits = q.shape[-1] <= 128 and min(q.shape[1], to.count) > 1
    return _by_flash(q, to) and not to.hidden and fits and capability(q) == 90


def _turned(*tensors: Tensor) -> list[Tensor]:
    """[B, H, T, K] from [B, T, H, K]."""
    return [x.transpose(1, 2) for x in tensors]


def _rows(*tensors: Tensor) -> list[Tensor]:
    """[B, ...] as rows laid end to end."""
    return [x.contiguous().flatten(0, 1) for x in tensors]


def _lengths(q: Tensor, to: Stretch) -> tuple[Tensor, Tensor, int, int]:
    """The segments, and bounds of their lengths."""
    assert to.segments is not None
    return *to.segments, q.shape[1], to.count


def _tiles(to: Stretch) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, keys and [B, queries, keys] of who sees whom; no tile that is after all its
    queries."""
    length, device = to.first.shape[1], to.first.device
    for low in range(0, length, QUERY_BLOCK):
        high = min(low + QUERY_BLOCK, length)
        query = torch.arange(low, high, device=device)[:, None]
        for near in range(0, min(to.count, high - to.start), KEY_BLOCK):
            far = min(near + KEY_BLOCK, to.count)
            key = torch.arange(near + to.start, far + to.start, device=device)
            seen = (key <= query) & (key >= to.first[:, low:high, None])
            yield slice(low, high), slice(near, far), seen


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` to a tile of keys."""
    scores, (_, _, v) = _scores(q, k, v, seen)
    lse = scores.logsumexp(dim=-1)  # [B, G, R, T]
    o = torch.einsum("bgrts,bsgk->btgrk", _weights(scores, lse), v)
    return o.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, lse: Tensor, delta: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` of a tile of keys; delta: [B, T, H], Σ_k do ⊙ o."""
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
