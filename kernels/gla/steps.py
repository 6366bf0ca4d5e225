"""The steps of GLA as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import Launch, padded, precision, step, strides
from fla_dist.kernels.common.levels import identity, span_types, spans
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gla.settings import Settings, settings
from fla_dist.kernels.gla.triton_kernels import (
    pair_gradient_kernel,
    prepare_kernel,
    score_gradient_kernel,
    summarize_kernel,
    walk_kernel,
)
from fla_dist.kernels.state import RESET

TILE = 16
CHUNK = 2 * TILE
"""Tokens: see triton_kernels.py."""
WIDEST = 128
"""V up to which the walk for dq has room for the scores' gradient too."""
_LEVELS = TILE.bit_length() - 1


def _settings(q: Tensor, v: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment; q and v may have any axes before the
    last."""
    chosen = settings(launches.capability(q), q.shape[-1], v.shape[-1], q.element_size())
    batch, length, heads, _ = v.shape
    return chosen, segment_length(batch, length, heads, CHUNK, chosen.programs, chosen.longest)


@step("fla_dist::gla_prepare")
def prepare(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q̄, k̄ [B, H, T, K], the chunks' log decays [B, H, N, K], the scores [B, H, T, C]."""
    batch, length, heads, key_size = q.shape
    chosen, _ = _settings(q, v)
    launch = chosen.prepare
    q_in, k_out = (q.new_empty(batch, heads, length, key_size) for _ in range(2))
    chunks = -(-length // CHUNK)
    chunk_decay = q.new_empty(batch, heads, chunks, key_size, dtype=torch.float32)
    scores = q.new_empty(batch, heads, length, CHUNK)
    prepare_kernel[(chunks * heads, batch)](
        q, g if k is None else k, g, bonus, doc_ids,
        identity(TILE, span_types(q.dtype)[0], q.device),
        q_in, k_out, chunk_decay, scores,
        length, heads, key_size, scale,
        *strides(q), *strides(g if k is None else k), *strides(g),
        RESET=RESET, TILE=TILE, LEVELS=_LEVELS,
        BK=min(padded(key_size, q.element_size()), launch.block), FREE_KEYS=k is None,
        BONUS=bonus is not None, PACKED=doc_ids is not None, STAGES=launch.stages,
        PRECISION=precision(q), **launch.options(),
    )  # fmt: skip
    return q_in, k_out, chunk_decay, scores


@prepare.register_fake
def _(q, k, v, g, bonus, doc_ids, scale):
    batch, length, heads, key_size = q.shape
    rows = q.new_empty(batch, heads, length, key_size)
    decay = q.new_empty(batch, heads, -(-length // CHUNK), key_size, dtype=torch.float32)
    return rows, torch.empty_like(rows), decay, q.new_empty(batch, heads, length, CHUNK)


@step("fla_dist::gla_summarize")
def summarize(y: Tensor, z: Tensor, chunk_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, K, V], and its log decays, [B, S, H, K, 1]
    (left unwritten in reverse), from (y, z) = (k̄, v) or in reverse (q̄, do)."""
    batch, heads, length, key_size = y.shape
    value_size, itemsize = z.shape[-1], z.element_size()
    chosen, segment = _settings(y, z)
    count = -(-length // segment)
    state = y.new_empty(batch, count, heads, key_size, value_size, dtype=torch.float32)
    log_decay = y.new_empty(batch, count, heads, key_size, 1, dtype=torch.float32)
    launch = chosen.summarize
    block_k = min(padded(key_size, itemsize), 128)
    block_v = min(padded(value_size, itemsize), launch.block)
    blocks = -(-key_size // block_k) * -(-value_size // block_v)
    summarize_kernel[(blocks, count, batch * heads)](
        y, z, chunk_decay, state, log_decay,
        length, heads, key_size, value_size, segment, *strides(z),
        C=CHUNK, BK=block_k, BV=block_v, REVERSE=reverse, PRECISION=precision(y),
        **launch.options(),
    )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(y, z, chunk_decay, reverse):
    batch, heads, length, key_size = y.shape
    shape = (batch, -(-length // _settings(y, z)[1]), heads, key_size)
    return (
        y.new_empty(*shape, z.shape[-1], dtype=torch.float32),
        y.new_empty(*shape, 1, dtype=torch.float32),
    )


def _walk(
    launch: Launch,
    segment: int,
    reads: tuple[Tensor, Tensor | None, Tensor, Tensor],
    scores: Tensor,
    chunk_decay: Tensor,
    state: Tensor,
    *,
    reverse: bool,
    scale: float,
    pairs: bool = False,
    keys: tuple[Tensor, ...] | None = None,
    value_side: Tensor | None = None,
) -> None:
    """reads: x, w, y, z.  keys: key_side, sums, final, entering, carries."""
    x, w, y, z = reads
    batch, length, heads, value_size = z.shape
    key_size, itemsize = x.shape[-1], z.element_size()
    block_k, block_v = padded(key_size, itemsize), padded(value_size, itemsize)
    if keys is None:
        block_v = min(block_v, launch.block)
    else:
        block_k = min(block_k, launch.block)
    blocks = -(-key_size // block_k) * -(-value_size // block_v)
    key_side, *others = keys if keys is not None else (scores,) * 5
    walk_kernel[(blocks, state.shape[1], batch * heads)](
        x, z if w is None else w, y, z, scores, chunk_decay, state, key_side,
        scores if value_side is None else value_side, *others,
        length, heads, key_size, value_size, segment, scale,
        *strides(z if w is None else w), *strides(z),
        C=CHUNK, BK=block_k, BV=block_v, KEYS=keys is not None, VALUES=value_side is not None,
        PAIRS=pairs, REVERSE=reverse, PRECISION=precision(x), STAGES=launch.stages,
        **launch.options(),
    )  # fmt: skip


@step("fla_dist::gla_output")
def output(
    q_in: Tensor, k_out: Tensor, v: Tensor, chunk_decay: Tensor, scores: Tensor, entering: Tensor
) -> Tensor:
    """o [B, T, H, V] from the states that enter the segments."""
    chosen, segment = _settings(q_in, v)
    out = v.new_empty(v.shape)
    _walk(
        chosen.output, segment, (q_in, None, k_out, v), scores, chunk_decay, entering,
        reverse=False, scale=1.0, value_side=out,
    )  # fmt: skip
    return out


@output.register_fake
def _(q_in, k_out, v, chunk_decay, scores, entering):
    return v.new_empty(v.shape)


@step("fla_dist::gla_query_gradient")
def query_gradient(
    do: Tensor,
    v: Tensor,
    q_in: Tensor,
    k_out: Tensor,
    chunk_decay: Tensor,
    entering: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """scale S do [B, T, H, K] from the states that enter the segments, Σ_t q̄_t ⊙ (S do_t) of chunks
    and their later tiles [B, H, N, 2, K], and the scores' gradient [B, H, T, C]."""
    chosen, segment = _settings(q_in, v)
    batch, heads, chunks, key_size = chunk_decay.shape
    out = q_in.new_empty(batch, q_in.shape[2], heads, key_size)
    sums = chunk_decay.new_empty(batch, heads, chunks, 2, key_size)
    score_gradient = q_in.new_empty(batch, heads, q_in.shape[2], CHUNK)
    pairs = v.shape[-1] <= WIDEST
    _walk(
        chosen.query_gradient, segment, (q_in, do, k_out, v), score_gradient, chunk_decay, entering,
        reverse=False, scale=scale, pairs=pairs, keys=(out, sums, entering, entering, sums),
    )  # fmt: skip
    if not pairs:
        score_gradient_kernel[(chunks * heads, batch)](
            do, v, score_gradient,
            q_in.shape[2], heads, v.shape[-1], scale, *strides(do), *strides(v),
            C=CHUNK, BV=min(padded(v.shape[-1], v.element_size()), 64), PRECISION=precision(v),
            **chosen.pair_gradient.options(),
        )  # fmt: skip
    return out, sums, score_gradient


@query_gradient.register_fake
def _(do, v, q_in, k_out, chunk_decay, entering, scale):
    batch, heads, length, key_size = q_in.shape
    sums = (batch, heads, chunk_decay.shape[2], 2, key_size)
    out = q_in.new_empty(batch, length, heads, key_size)
    return out, chunk_decay.new_empty(sums), q_in.new_empty(batch, heads, length, CHUNK)


@step("fla_dist::gla_backward")
def backward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    do: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    doc_ids: Tensor | None,
    q_in: Tensor,
    k_out: Tensor,
    chunk_decay: Tensor,
    scores: Tensor,
    outer_dq: Tensor,
    sums: Tensor,
    score_gradient: Tensor,
    entering: Tensor,
    final: Tensor,
    leaving_gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk (a scratch tensor where there is no k), dv, dg and the bonus' gradient of each chunk
    [B, H, N, K], from `query_gradient`, the states that enter the segments and the gradients of
    those that leave them."""
    batch, length, heads, key_size = q.shape
    value_size, itemsize = v.shape[-1], v.element_size()
    chosen, segment = _settings(q, v)
    dq, dk = q.new_empty(q.shape), q.new_empty(q.shape)
    dv, dg = v.new_empty(v.shape), g.new_empty(g.shape)
    carries = torch.empty_like(sums)
    keys = (dk, sums, final, entering, carries)
    reads = (k_out, v, q_in, do)
    launch = chosen.key_gradient
    together = launch.block >= max(padded(key_size, itemsize), padded(value_size, itemsize))
    _walk(
        launch, segment, reads, scores, chunk_decay, leaving_gradient,
        reverse=True, scale=scale, keys=keys, value_side=dv if together else None,
    )  # fmt: skip
    if not together:
        _walk(
            chosen.output, segment, reads, scores, chunk_decay, leaving_gradient,
            reverse=True, scale=scale, value_side=dv,
        )  # fmt: skip
    launch = chosen.pair_gradient
    chunks = chunk_decay.shape[2]
    bonus_gradient = chunk_decay.new_empty(
        (batch, heads, chunks, key_size) if bonus is not None else (0,)
    )
    pair_gradient_kernel[(chunks * heads, batch)](
        q, g if k is None else k, g, bonus, doc_ids,
        identity(TILE, span_types(q.dtype)[0], q.device),
        spans(TILE, span_types(q.dtype)[1], q.device, bonus is not None),
        score_gradient, carries, outer_dq, dq, dk, dg, bonus_gradient,
        length, heads, key_size, *strides(q), *strides(g if k is None else k), *strides(g),
        TILE=TILE, LEVELS=_LEVELS, BK=min(padded(key_size, itemsize), launch.block),
        FREE_KEYS=k is None, BONUS=bonus is not None, PACKED=doc_ids is not None,
        SPLIT=q.dtype == torch.float16, STAGES=launch.stages, PRECISION=precision(q),
        **launch.options(),
    )  # fmt: skip
    return dq, dk, dv, dg, bonus_gradient


@backward.register_fake
def _(
    q, k, v, do, g, bonus, doc_ids, q_in, k_out, chunk_decay, scores, outer_dq, sums,
    score_gradient, entering, final, leaving_gradient, scale,
):  # fmt: skip
    return (
        q.new_empty(q.shape), q.new_empty(q.shape), v.new_empty(v.shape), g.new_empty(g.shape),
        chunk_decay.new_empty(chunk_decay.shape if bonus is not None else (0,)),
    )  # fmt: skip
