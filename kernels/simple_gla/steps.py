"""The steps of simple GLA as torch.library ops: tensors in, tensors out.

q, k: [B, T, Q, K], Q heads that serve H / Q heads of v each.  v: [B, T, H, V].  g: [B, T, H] or
[H] or None.  step, the weight of each token and head: [B, T, H] fp32 or None.
skip, how much of v is added to o: [H] fp32 or None.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import padded, precision, step
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.simple_gla.settings import Settings, settings
from fla_dist.kernels.simple_gla.triton_kernels import (
    HEAD_DECAY,
    NO_DECAY,
    TOKEN_DECAY,
    decay_gradient_kernel,
    key_kernel,
    summarize_kernel,
    value_kernel,
)
from fla_dist.kernels.state import RESET


def _settings(q: Tensor, v: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment."""
    batch, length, heads, value_size = v.shape
    chosen = settings(launches.capability(q), q.shape[-1], value_size, q.element_size())
    return chosen, segment_length(
        batch, length, heads, chosen.chunk, chosen.programs, chosen.longest
    )


def _segments(q: Tensor, v: Tensor) -> int:
    return -(-q.shape[1] // _settings(q, v)[1])


def _decay(g: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """The kind of decay, and its strides."""
    if g is None:
        return NO_DECAY.value, (0, 0, 0)
    return (HEAD_DECAY.value, (0, 0, 0)) if g.ndim == 1 else (TOKEN_DECAY.value, g.stride())


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of the batch, the tokens and the heads; the last axis is contiguous."""
    return (0, 0, 0) if x is None else x.stride()[:3]


_padded = lru_cache(padded)


@lru_cache
def _blocks(size: int, itemsize: int, widest: int) -> tuple[int, int]:
    """The width of blocks that an axis is divided into, and their number."""
    width = min(_padded(size, itemsize), widest)
    return width, -(-size // width)


def _room(like: Tensor, wanted: bool, *shape: int) -> Tensor | None:
    return like.new_empty(shape, dtype=torch.float32) if wanted else None


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors only."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


@step("fla_dist::simple_gla_summarize")
def summarize(
    y: Tensor,
    z: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    doc_ids: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, K, V], and its log decay, [B, S, H, 1, 1]
    (left unwritten in reverse). y is k and z is v, or in reverse q and do."""
    batch, length, heads, size_z = z.shape
    size_x, itemsize = y.shape[-1], z.element_size()
    chosen, segment = _settings(y, z)
    count = -(-length // segment)
    state = torch.empty(batch, count, heads, size_x, size_z, dtype=torch.float32, device=y.device)
    log_decay = torch.empty(batch, count, heads, 1, 1, dtype=torch.float32, device=y.device)
    launch = chosen.summarize
    block_x, blocks_x = _blocks(size_x, itemsize, 128)
    block_z, blocks_z = _blocks(size_z, itemsize, launch.block)
    kind, decay_strides = _decay(g)
    summarize_kernel[(blocks_x * blocks_z, count, batch * heads)](
        y, z, g, step, doc_ids, state, log_decay,
        length, heads, heads // y.shape[2], segment, scale, *_strides(y),
        *_strides(z), *decay_strides, *_strides(step),
        RESET=RESET, X=size_x, Z=size_z, C=chosen.chunk, BX=block_x, BZ=block_z, DECAY=kind,
        STEP=step is not None,
        PACKED=doc_ids is not None, REVERSE=reverse, PRECISION=precision(y), **launch.options(),
    )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(y, z, g, step, doc_ids, scale, reverse):
    batch, _, heads, size_z = z.shape
    shape = (batch, _segments(y, z), heads)
    return (
        y.new_empty(*shape, y.shape[-1], size_z, dtype=torch.float32),
        y.new_empty(*shape, 1, 1, dtype=torch.float32),
    )


def _value_walk(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    own: Tensor | None,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    doc_ids: Tensor | None,
    state: Tensor,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One launch of `value_kernel`: its output and, of each block, the gradients of step and
    skip."""
    batch, length, heads, size_z = z.shape
    size_x, itemsize = x.shape[-1], z.element_size()
    chosen, segment = _settings(x, z)
    out = torch.empty(batch, length, heads, size_z, dtype=z.dtype, device=z.device)
    block_z, blocks = _blocks(size_z, itemsize, chosen.output.block)
    step_gradient, skip_gradient = (
        _room(z, reverse and weight is not None, blocks, batch, heads, length)
        for weight in (step, skip)
    )
    kind, decay_strides = _decay(g)
    value_kernel[(blocks, state.shape[1], batch * heads)](
        x, y, z, own, g, step, skip, doc_ids, state, out, step_gradient, skip_gradient,
        length, heads, heads // x.shape[2], segment, scale, *_strides(x),
        *_strides(y), *_strides(z), *_strides(own), *decay_strides, *_strides(step),
        X=size_x, Z=size_z, C=chosen.chunk, BX=_padded(size_x, itemsize), BZ=block_z, DECAY=kind,
        STEP=step is not None, SKIP=skip is not None, PACKED=doc_ids is not None, REVERSE=reverse,
        PRECISION=precision(x), **chosen.output.options(),
    )  # fmt: skip
    return out, step_gradient, skip_gradient


@step("fla_dist::simple_gla_output")
def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    doc_ids: Tensor | None,
    entering: Tensor,
    scale: float,
) -> Tensor:
    """o [B, T, H, V] from the states that enter the segments."""
    return _value_walk(q, k, v, None, g, step, skip, doc_ids, entering, scale, False)[0]


@output.register_fake
def _(q, k, v, g, step, skip, doc_ids, entering, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@step("fla_dist::simple_gla_value_gradient")
def value_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    doc_ids: Tensor | None,
    leaving_gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dv, and from the gradients of the states that leave the segments dstep [B, T, H] and dskip
    [H], fp32, empty where there is none."""
    dv, step_gradient, skip_gradient = _value_walk(
        k, q, do, v, g, step, skip, doc_ids, leaving_gradient, scale, True
    )
    dstep = None if step_gradient is None else step_gradient.sum(0).transpose(1, 2)
    dskip = None if skip_gradient is None else skip_gradient.sum((0, 1, 3))
    return dv, _or_empty(dstep, v), _or_empty(dskip, v)


@value_gradient.register_fake
def _(q, k, v, do, g, step, skip, doc_ids, leaving_gradient, scale):
    batch, length, heads, _ = v.shape
    dstep = v.new_empty(batch, heads, length, dtype=torch.float32).transpose(1, 2)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        _or_empty(None if step is None else dstep, v),
        _or_empty(_room(v, skip is not None, heads), v),
    )


def _key_walk(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    own: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    doc_ids: Tensor | None,
    state: Tensor,
    scale: float,
    with_decay: bool,
    borders: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """One launch of `key_kernel`, its output summed over the heads that share z; `pair_sums` and
    `state_sums` [blocks, B, H, T]; forward `borders`, in reverse `across`."""
    batch, length, heads, size_x = x.shape
    shared, size_z = z.shape[2:]
    itemsize = x.element_size()
    chosen, segment = _settings(z, x)
    out = torch.empty(batch, length, heads, size_z, dtype=z.dtype, device=z.device)
    block_z, blocks = _blocks(size_z, itemsize, chosen.key_gradient.block)
    pair_sums, state_sums = (
        _room(x, wanted, blocks, batch, heads, length)
        for wanted in (with_decay and reverse, with_decay)
    )
    across = None
    chunks = -(-length // chosen.chunk)
    if with_decay:
        if reverse:
            across = _room(x, True, blocks, batch, chunks, heads)
        else:
            borders = x.new_empty(batch, chunks, heads, size_x, size_z)
    kind, decay_strides = _decay(g)
    key_kernel[(blocks, state.shape[1], batch * heads)](
        x, y, z, own, g, step, doc_ids, state, out, pair_sums, state_sums, borders, across,
        length, heads, heads // shared, segment, scale, *_strides(x), *_strides(y),
        *_strides(z), *_strides(own), *decay_strides, *_strides(step),
        X=size_x, Z=size_z, C=chosen.chunk, BX=_padded(size_x, itemsize),
        BZ=block_z, DECAY=kind,
        STEP=step is not None, PACKED=doc_ids is not None, REVERSE=reverse, SUMS=with_decay,
        PRECISION=precision(x), **chosen.key_gradient.options(),
    )  # fmt: skip
    if heads != shared:
        out = out.view(batch, length, shared, heads // shared, size_z).sum(3)
    return out, pair_sums, state_sums, borders, across


def _sums(q: Tensor, v: Tensor, wanted: bool) -> Tensor:
    """`_key_walk`'s sums, for a fake."""
    batch, length, heads, _ = v.shape
    widest = _settings(q, v)[0].key_gradient.block
    _, blocks = _blocks(q.shape[-1], q.element_size(), widest)
    return _or_empty(_room(q, wanted, blocks, batch, heads, length), q)


@step("fla_dist::simple_gla_query_gradient")
def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    doc_ids: Tensor | None,
    entering: Tensor,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq from the states that enter the segments, what `decay_gradient` needs of it, and the states
    that enter chunks, [B, chunks, H, V, K], for `key_gradient`."""
    dq, _, state_sums, borders, _ = _key_walk(
        do, v, k, q, g, step, doc_ids, entering, scale, with_decay, None, False
    )
    return dq, _or_empty(state_sums, q), _or_empty(borders, q)


@query_gradient.register_fake
def _(q, k, v, do, g, step, doc_ids, entering, scale, with_decay):
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not with_decay:
        return dq, _sums(q, v, False), _or_empty(None, q)
    batch, length, heads, width = v.shape
    chunks = -(-length // _settings(q, v)[0].chunk)
    return dq, _sums(q, v, True), v.new_empty(batch, chunks, heads, width, q.shape[-1])


@step("fla_dist::simple_gla_key_gradient")
def key_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    doc_ids: Tensor | None,
    leaving_gradient: Tensor,
    borders: Tensor,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dk from the gradients of the states that leave the segments, and what `decay_gradient` needs
    of it."""
    dk, pair_sums, state_sums, _, across = _key_walk(
        v, do, q, k, g, step, doc_ids, leaving_gradient, scale, with_decay, borders, True
    )
    return dk, _or_empty(pair_sums, q), _or_empty(state_sums, q), _or_empty(across, q)


@key_gradient.register_fake
def _(q, k, v, do, g, step, doc_ids, leaving_gradient, borders, scale, with_decay):
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    sums = _sums(q, v, with_decay)
    batch, length, heads, _ = v.shape
    chunks = -(-length // _settings(q, v)[0].chunk)
    across = _room(q, with_decay, sums.shape[0], batch, chunks, heads)
    return dk, sums, torch.empty_like(sums), _or_empty(across, q)


@step("fla_dist::simple_gla_decay_gradient")
def decay_gradient(
    q: Tensor,
    v: Tensor,
    query_sums: Tensor,
    pair_sums: Tensor,
    key_sums: Tensor,
    across: Tensor,
) -> Tensor:
    """dg [B, T, H] fp32."""
    batch, length, heads, _ = v.shape
    chunk = _settings(q, v)[0].chunk
    dg = torch.empty(batch, length, heads, dtype=torch.float32, device=q.device)
    rows = 16
    decay_gradient_kernel[(-(-length // (chunk * rows)), batch * heads)](
        query_sums, pair_sums, key_sums, across, dg, length, heads, batch,
        C=chunk, R=rows, QUERY_BLOCKS=query_sums.shape[0], KEY_BLOCKS=key_sums.shape[0],
        num_warps=4,
    )  # fmt: skip
    return dg


@decay_gradient.register_fake
def _(q, v, query_sums, pair_sums, key_sums, across):
    return v.new_empty(v.shape[:3], dtype=torch.float32)
