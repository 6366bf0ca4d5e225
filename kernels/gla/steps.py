"""The steps of GLA as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import padded, precision, strides
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gla.settings import Settings, settings
from fla_dist.kernels.gla.triton_kernels import (
    key_walk_kernel,
    pair_gradient_kernel,
    score_kernel,
    summarize_kernel,
    value_walk_kernel,
)
from fla_dist.kernels.state import RESET


def _settings(q: Tensor, v: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment."""
    batch, length, heads, key_size = q.shape
    chosen = settings(launches.capability(q), key_size, v.shape[-1], q.element_size())
    return chosen, segment_length(
        batch, length, heads, chosen.chunk, chosen.programs, chosen.longest
    )


@torch.library.custom_op("fla_dist::gla_summarize", mutates_args=())
def summarize(
    y: Tensor, z: Tensor, g: Tensor, doc_ids: Tensor | None, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, K, V], and its log decays, [B, S, H, K, 1]
    (left unwritten in reverse)."""
    batch, length, heads, key_size = y.shape
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
        y, z, g, doc_ids, state, log_decay,
        length, heads, key_size, value_size, segment, scale, *strides(y), *strides(z), *strides(g),
        RESET=RESET, C=chosen.chunk, BK=block_k, BV=block_v, PACKED=doc_ids is not None,
        REVERSE=reverse,
        PRECISION=precision(y), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(y, z, g, doc_ids, scale, reverse):
    batch, length, heads, key_size = y.shape
    count = -(-length // _settings(y, z)[1])
    return (
        y.new_empty(batch, count, heads, key_size, z.shape[-1], dtype=torch.float32),
        y.new_empty(batch, count, heads, key_size, 1, dtype=torch.float32),
    )


@torch.library.custom_op("fla_dist::gla_scores", mutates_args=())
def scores(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc_ids: Tensor | None, scale: float
) -> Tensor:
    """[B, H, T, C]: what each token takes of those before it in its chunk; needs no state."""
    batch, length, heads, key_size = q.shape
    chosen, _ = _settings(q, v)
    launch, chunk = chosen.scores, chosen.chunk
    out = q.new_empty(batch, heads, length, chunk)
    score_kernel[(triton.cdiv(length, chunk), batch * heads)](
        q, k, g, doc_ids, out,
        length, heads, key_size, scale, *strides(q), *strides(k), *strides(g),
        C=chunk, LEVELS=chunk.bit_length() - 1, BK=min(padded(key_size, q.element_size()),
        launch.block),
        PACKED=doc_ids is not None, PRECISION=precision(q), num_warps=launch.warps,
        num_stages=launch.stages,
    )  # fmt: skip
    return out


@scores.register_fake
def _(q, k, v, g, doc_ids, scale):
    batch, length, heads, _ = q.shape
    return q.new_empty(batch, heads, length, _settings(q, v)[0].chunk)


def _value_walk(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    pair_scores: Tensor,
    state: Tensor,
    scale: float,
    reverse: bool,
) -> Tensor:
    batch, length, heads, key_size = x.shape
    value_size, itemsize = z.shape[-1], z.element_size()
    chosen, segment = _settings(x, z)
    launch = chosen.value_walk
    block_v = min(padded(value_size, itemsize), launch.block)
    out = z.new_empty(z.shape)
    value_walk_kernel[(triton.cdiv(value_size, block_v), state.shape[1], batch * heads)](
        x, y, z, g, doc_ids, pair_scores, state, out,
        length, heads, key_size, value_size, segment, scale,
        *strides(x), *strides(y), *strides(z), *strides(g),
        C=chosen.chunk, BK=padded(key_size, itemsize), BV=block_v, PACKED=doc_ids is not None,
        REVERSE=reverse, PRECISION=precision(x), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("fla_dist::gla_output", mutates_args=())
def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    pair_scores: Tensor,
    entering: Tensor,
    scale: float,
) -> Tensor:
    """o [B, T, H, V] from the states that enter the segments."""
    return _value_walk(q, k, v, g, doc_ids, pair_scores, entering, scale, False)


@output.register_fake
def _(q, k, v, g, doc_ids, pair_scores, entering, scale):
    return v.new_empty(v.shape)


@torch.library.custom_op("fla_dist::gla_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    pair_scores: Tensor,
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
    chunks = triton.cdiv(length, chosen.chunk)
    launch = chosen.key_walk
    block_k = min(padded(key_size, itemsize), launch.block)
    dq, dk, dg = q.new_empty(q.shape), k.new_empty(k.shape), g.new_empty(g.shape)
    chunk_sums, carries = (
        q.new_empty(batch, heads, chunks, key_size, dtype=torch.float32) for _ in range(2)
    )
    for reverse, x, y, z, own, state, out in (
        (False, do, k, v, q, entering, dq),
        (True, v, q, do, k, leaving_gradient, dk),
    ):
        key_walk_kernel[(triton.cdiv(key_size, block_k), state.shape[1], batch * heads)](
            x, y, z, own, g, doc_ids, state, out, chunk_sums, final, entering, carries,
            length, heads, key_size, value_size, segment, scale,
            *strides(x), *strides(y), *strides(z), *strides(own), *strides(g),
            C=chosen.chunk, BK=block_k, BV=padded(value_size, itemsize), PACKED=doc_ids is not None,
            REVERSE=reverse, PRECISION=precision(x), num_warps=launch.warps,
            num_stages=launch.stages,
        )  # fmt: skip
    dv = _value_walk(k, q, do, g, doc_ids, pair_scores, leaving_gradient, scale, True)
    launch = chosen.pair_gradient
    block_k = min(padded(key_size, itemsize), launch.block)
    pair_gradient_kernel[(triton.cdiv(key_size, block_k), chunks, batch * heads)](
        q, k, v, do, g, doc_ids, carries, dq, dk, dg,
        length, heads, key_size, value_size, scale,
        *strides(q), *strides(k), *strides(v), *strides(do), *strides(g),
        C=chosen.chunk, LEVELS=chosen.chunk.bit_length() - 1, BK=block_k,
        BV=min(padded(value_size, itemsize), launch.block), PACKED=doc_ids is not None,
        PRECISION=precision(q), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return dq, dk, dv, dg


@backward.register_fake
def _(q, k, v, do, g, doc_ids, pair_scores, entering, final, leaving_gradient, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), g.new_empty(g.shape)
