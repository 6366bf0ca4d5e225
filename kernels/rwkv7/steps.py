"""The steps of RWKV7's recurrence as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fla_dist.kernels.common.launch import floats, padded, precision, step
from fla_dist.kernels.common.levels import identity, spans
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.rwkv7.settings import Settings, settings
from fla_dist.kernels.rwkv7.triton_kernels import (
    key_walk_kernel,
    pair_gradient_kernel,
    prepare_kernel,
    value_walk_kernel,
)


def _settings(r: Tensor, v: Tensor) -> Settings:
    """Of r and v, or of what has their last axes."""
    return settings(r.shape[-1], v.shape[-1], r.dtype)


def _segment(chosen: Settings, v: Tensor) -> int:
    """Tokens of a segment, a multiple of the stretch."""
    batch, length, heads, _ = v.shape
    return segment_length(batch, length, heads, chosen.stretch, chosen.programs, length)


def segments(r: Tensor, v: Tensor) -> int:
    return -(-v.shape[1] // _segment(_settings(r, v), v))


@lru_cache
def _spans(chunk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[levels + 3, C, C]: spans that leave t out, and last each token's own."""
    own = identity(chunk, dtype, device)
    return torch.cat([spans(chunk, dtype, device, exclusive=True), own[None]])


def _span_types(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of the spans that sum exponents, and of those that sum their gradients."""
    if dtype == torch.float32:
        return torch.float32, torch.float32
    return torch.float16, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@step("fla_dist::rwkv7_prepare")
def prepare(
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reads` (W, r̄) and `writes` (b̄, k̄) [2, B, H, T, K], `pairs` [4, B, H, T, C], and the decay
    over each chunk [B, H, N, K]; of v only the shape matters."""
    batch, length, heads, key_size = r.shape
    chosen = _settings(r, v)
    chunk, launch = chosen.chunk, chosen.prepare
    count = -(-length // chunk)
    reads, writes = (r.new_empty(2, batch, heads, length, key_size) for _ in range(2))
    pairs = r.new_empty(4, batch, heads, length, chunk)
    through = floats(r, batch, heads, count, key_size)
    prepare_kernel[(count, batch * heads)](
        r, k, a, b, g, doc_ids, _spans(chunk, _span_types(r.dtype)[0], r.device),
        reads, writes, pairs, through,
        length, heads, scale,
        C=chunk, LEVELS=chunk.bit_length() - 1, K=key_size,
        BK=min(padded(key_size, r.element_size()), launch.block), PACKED=doc_ids is not None,
        STAGES=launch.stages, PRECISION=precision(r),
        SOLVE="ieee" if r.dtype == torch.float32 else "tf32x3", **launch.options(),
    )  # fmt: skip
    return reads, writes, pairs, through


@prepare.register_fake
def _(r, k, v, a, b, g, doc_ids, scale):
    batch, length, heads, key_size = r.shape
    chunk = _settings(r, v).chunk
    reads = r.new_empty(2, batch, heads, length, key_size)
    pairs = r.new_empty(4, batch, heads, length, chunk)
    through = floats(r, batch, heads, -(-length // chunk), key_size)
    return reads, torch.empty_like(reads), pairs, through


def _value_walk(
    reads: Tensor, writes: Tensor, z: Tensor, pairs: Tensor, through: Tensor,
    entering: Tensor | None, out: Tensor | None, solved: Tensor | None, states: Tensor | None,
    leaving: Tensor, transition: Tensor | None, reverse: bool,
) -> None:  # fmt: skip
    batch, length, heads, value_size = z.shape
    key_size, itemsize = reads.shape[-1], z.element_size()
    chosen = _settings(reads, z)
    segment = _segment(chosen, z)
    launch = chosen.value_walk if states is not None else chosen.summarize
    block = min(padded(value_size, itemsize), launch.block)
    blocks = -(-value_size // block)
    if transition is not None:
        blocks += -(-key_size // block)
    if reverse:
        reads, writes = writes, reads
    value_walk_kernel[(blocks, -(-length // segment), batch * heads)](
        reads, writes, z, pairs, through, entering, out, solved, states, leaving, transition,
        length, heads, segment, segment if states is None else chosen.stretch,
        C=chosen.chunk, K=key_size, V=value_size, BK=padded(key_size, itemsize), BV=block,
        REVERSE=reverse, SUMMARIZE=states is None, STAGES=launch.stages, PRECISION=precision(z),
        **launch.options(),
    )  # fmt: skip


@step("fla_dist::rwkv7_summarize")
def summarize(
    reads: Tensor, writes: Tensor, v: Tensor, pairs: Tensor, through: Tensor
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state [B, S, H, K, V], and its transition [B, S, H, K, K]."""
    batch, _, heads, value_size = v.shape
    key_size = reads.shape[-1]
    count = segments(reads, v)
    state = floats(v, batch, count, heads, key_size, value_size)
    transition = floats(v, batch, count, heads, key_size, key_size)
    _value_walk(
        reads, writes, v, pairs, through, None, None, None, None, state, transition, False
    )  # fmt: skip
    return state, transition


@summarize.register_fake
def _(reads, writes, v, pairs, through):
    batch, _, heads, value_size = v.shape
    key_size = reads.shape[-1]
    shape = batch, segments(reads, v), heads, key_size
    return floats(v, *shape, value_size), floats(v, *shape, key_size)


@step("fla_dist::rwkv7_summarize_gradient")
def summarize_gradient(
    reads: Tensor, writes: Tensor, do: Tensor, pairs: Tensor, through: Tensor
) -> Tensor:
    """The gradient that each segment's tokens give its entering state [B, S, H, K, V]."""
    batch, _, heads, value_size = do.shape
    gradient = floats(do, batch, segments(reads, do), heads, reads.shape[-1], value_size)
    _value_walk(
        reads, writes, do, pairs, through, None, None, None, None, gradient, None, True
    )  # fmt: skip
    return gradient


@summarize_gradient.register_fake
def _(reads, writes, do, pairs, through):
    batch, _, heads, value_size = do.shape
    return floats(do, batch, segments(reads, do), heads, reads.shape[-1], value_size)


@step("fla_dist::rwkv7_walk")
def walk(
    reads: Tensor, writes: Tensor, z: Tensor, pairs: Tensor, through: Tensor, entering: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From the states that enter the segments: o and U of z = v, the states that enter the
    stretches, and the last one. In reverse, from the gradients of those that leave the segments: dv
    and dU of z = do, the gradients of the states that leave the stretches, and that of the first
    one."""
    batch, length, heads, value_size = z.shape
    key_size = reads.shape[-1]
    out, solved = torch.empty_like(z), torch.empty_like(z)
    count = -(-length // _settings(reads, z).stretch)
    states = floats(z, batch, count, heads, key_size, value_size)
    leaving = floats(z, batch, heads, key_size, value_size)
    _value_walk(
        reads, writes, z, pairs, through, entering, out, solved, states, leaving, None, reverse
    )  # fmt: skip
    return out, solved, states, leaving


@walk.register_fake
def _(reads, writes, z, pairs, through, entering, reverse):
    batch, length, heads, value_size = z.shape
    key_size = reads.shape[-1]
    count = -(-length // _settings(reads, z).stretch)
    return (
        torch.empty_like(z), torch.empty_like(z),
        floats(z, batch, count, heads, key_size, value_size),
        floats(z, batch, heads, key_size, value_size),
    )  # fmt: skip


@step("fla_dist::rwkv7_key_gradient")
def key_gradient(
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, do: Tensor, u: Tensor,
    du: Tensor, doc_ids: Tensor | None, reads: Tensor, writes: Tensor, pairs: Tensor,
    through: Tensor, states: Tensor, final: Tensor, gradients: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dr, dk, da, db, dg from what both walks gave: `final`, the state after the last token, and
    `gradients`, those of the states that leave the stretches."""
    batch, length, heads, key_size = r.shape
    value_size, itemsize = v.shape[-1], v.element_size()
    chosen = _settings(r, v)
    dr, dk, da, db, dg = (torch.empty_like(x) for x in (r, k, a, b, g))
    sums, across = torch.empty_like(through), torch.empty_like(through)
    launch = chosen.key_walk
    block = min(padded(key_size, itemsize), launch.block)
    for reverse, values, added, own, other, kept, first, second in (
        (False, (du, do), (u, v), reads, writes, states, da, dr),
        (True, (u, v), (du, do), writes, reads, gradients, db, dk),
    ):
        key_walk_kernel[(-(-key_size // block), states.shape[1], batch * heads)](
            *values, *added, own, other, through, kept, first, second, sums,
            states, final, across,
            length, heads, chosen.stretch,
            C=chosen.chunk, K=key_size, V=value_size, BK=block, BV=padded(value_size, itemsize),
            REVERSE=reverse, STAGES=launch.stages, PRECISION=precision(r), **launch.options(),
        )  # fmt: skip
    chunk, launch = chosen.chunk, chosen.pair_gradient
    summed, gradient_spans = (_spans(chunk, dtype, r.device) for dtype in _span_types(r.dtype))
    pair_gradient_kernel[(through.shape[2], batch * heads)](
        r, k, a, b, g, v, do, u, du, doc_ids, summed, gradient_spans, pairs, across,
        dr, dk, da, db, dg,
        length, heads, scale,
        C=chunk, LEVELS=chunk.bit_length() - 1, K=key_size, V=value_size,
        BK=min(padded(key_size, itemsize), launch.block),
        BV=min(padded(value_size, itemsize), 128 // itemsize),
        PACKED=doc_ids is not None, STAGES=launch.stages, PRECISION=precision(r),
        **launch.options(),
    )  # fmt: skip
    return dr, dk, da, db, dg


@key_gradient.register_fake
def _(
    r, k, v, a, b, g, do, u, du, doc_ids, reads, writes, pairs, through, states, final, gradients,
    scale,
):  # fmt: skip
    return tuple(torch.empty_like(x) for x in (r, k, a, b, g))
