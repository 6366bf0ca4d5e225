"""The steps of GLA as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import padded, precision, step, strides
from fla_dist.kernels.common.levels import span_types, spans
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gla.settings import Settings, settings
from fla_dist.kernels.gla.triton_kernels import (
    key_walk_kernel,
    pair_gradient_kernel,
    prepare_kernel,
    summarize_kernel,
    value_walk_kernel,
)
from fla_dist.kernels.state import RESET


def _settings(q: Tensor, v: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment; q and v may have any axes before the
    last."""
    chosen = settings(launches.capability(q), q.shape[-1], v.shape[-1], q.element_size())
    batch, length, heads, _ = v.shape
    return chosen, segment_length(
        batch, length, heads, chosen.chunk, chosen.programs, chosen.longest
    )


@step("fla_dist::gla_prepare")
def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q̄, k̄ [B, H, T, K], the chunks' log decays [B, H, N, K], the scores [B, H, T, C]."""
    batch, length, heads, key_size = q.shape
    chosen, _ = _settings(q, v)
    launch, chunk = chosen.prepare, chosen.chunk
    chunks = triton.cdiv(length, chunk)
    q_in, k_out = (q.new_empty(batch, heads, length, key_size) for _ in range(2))
    chunk_decay = q.new_empty(batch, heads, chunks, key_size, dtype=torch.float32)
    scores = q.new_empty(batch, heads, length, chunk)
    prepare_kernel[(chunks, batch * heads)](
        q, k, g, doc_ids, spans(chunk, span_types(q.dtype)[0], q.device),
        q_in, k_out, chunk_decay, scores,
        length, heads, key_size, scale,
        *strides(q), *strides(k), *strides(g),
        RESET=RESET, C=chunk, LEVELS=chunk.bit_length() - 1,
        BK=min(padded(key_size, q.element_size()), launch.block), PACKED=doc_ids is not None,
        PRECISION=precision(q), **launch.options(),
    )  # fmt: skip
    return q_in, k_out, chunk_decay, scores


@prepare.register_fake
def _(q, k, v, g, doc_ids, scale):
    batch, length, heads, key_size = q.shape
    chunk = _settings(q, v)[0].chunk
    rows = q.new_empty(batch, heads, length, key_size)
    decay = q.new_empty(batch, heads, -(-length // chunk), key_size, dtype=torch.float32)
    return rows, torch.empty_like(rows), decay, q.new_empty(batch, heads, length, chunk)


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
    blocks = triton.cdiv(key_size, block_k) * triton.cdiv(value_size, block_v)
    summarize_kernel[(blocks, count, batch * heads)](
        y, z, chunk_decay, state, log_decay,
        length, heads, key_size, value_size, segment, *strides(z),
        C=chosen.chunk, BK=block_k, BV=block_v, REVERSE=reverse, PRECISION=precision(y),
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


def _value_walk(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    chunk_decay: Tensor,
    scores: Tensor,
    state: Tensor,
    reverse: bool,
) -> Tensor:
    batch, length, heads, value_size = z.shape
    key_size, itemsize = x.shape[-1], z.element_size()
    chosen, segment = _settings(x, z)
    launch = chosen.value_walk
    block_v = min(padded(value_size, itemsize), launch.block)
    out = z.new_empty(z.shape)
    value_walk_kernel[(triton.cdiv(value_size, block_v), state.shape[1], batch * heads)](
        x, y, z, chunk_decay, scores, state, out,
        length, heads, key_size, value_size, segment, *strides(z),
        C=chosen.chunk, BK=padded(key_size, itemsize), BV=block_v, REVERSE=reverse,
        PRECISION=precision(x), **launch.options(),
    )  # fmt: skip
    return out


@step("fla_dist::gla_output")
def output(
    q_in: Tensor, k_out: Tensor, v: Tensor, chunk_decay: Tensor, scores: Tensor, entering: Tensor
) -> Tensor:
    """o [B, T, H, V] from the states that enter the segments."""
    return _value_walk(q_in, k_out, v, chunk_decay, scores, entering, False)


@output.register_fake
def _(q_in, k_out, v, chunk_decay, scores, entering):
    return v.new_empty(v.shape)


@step("fla_dist::gla_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    q_in: Tensor,
    k_out: Tensor,
    chunk_decay: Tensor,
    scores: Tensor,
    entering: Tensor,
    final: Tensor,
    leaving_gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dg from the states that enter the segments and the gradients of those that leave
    them."""
    batch, length, heads, key_size = q.shape
    value_size, itemsize = v.shape[-1], v.element_size()
    chosen, segment = _settings(q, v)
    launch = chosen.key_walk
    block_k = min(padded(key_size, itemsize), launch.block)
    dq, dk, dg = q.new_empty(q.shape), k.new_empty(k.shape), g.new_empty(g.shape)
    chunk_sums, carries = torch.empty_like(chunk_decay), torch.empty_like(chunk_decay)
    for reverse, x, y, z, own, state, out in (
        (False, do, k_out, v, q_in, entering, dq),
        (True, v, q_in, do, k_out, leaving_gradient, dk),
    ):
        key_walk_kernel[(triton.cdiv(key_size, block_k), state.shape[1], batch * heads)](
            x, y, z, own, chunk_decay, state, out, chunk_sums, final, entering, carries,
            length, heads, key_size, value_size, segment, scale, *strides(x), *strides(z),
            C=chosen.chunk, BK=block_k, BV=padded(value_size, itemsize), REVERSE=reverse,
            PRECISION=precision(x), **launch.options(),
        )  # fmt: skip
    dv = _value_walk(k_out, q_in, do, chunk_decay, scores, leaving_gradient, True)
    launch, chunk = chosen.pair_gradient, chosen.chunk
    summed, gradient_spans = (spans(chunk, dtype, q.device) for dtype in span_types(q.dtype))
    pair_gradient_kernel[(chunk_decay.shape[2], batch * heads)](
        q, k, v, do, g, doc_ids, summed, gradient_spans, carries, dq, dk, dg,
        length, heads, key_size, value_size, scale,
        *strides(q), *strides(k), *strides(v), *strides(do), *strides(g),
        C=chunk, LEVELS=chunk.bit_length() - 1, BK=min(padded(key_size, itemsize), launch.block),
        BV=min(padded(value_size, itemsize), 64), PACKED=doc_ids is not None,
        PRECISION=precision(q), **launch.options(),
    )  # fmt: skip
    return dq, dk, dv, dg


@backward.register_fake
def _(
    q, k, v, do, g, doc_ids, q_in, k_out, chunk_decay, scores, entering, final, leaving_gradient,
    scale,
):  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), g.new_empty(g.shape)
