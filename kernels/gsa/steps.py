"""The steps of GSA as torch.library ops: tensors in, tensors out. Notation of triton_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import Launch, padded, precision, step, strides
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gla.steps import _span_types, _spans
from fla_dist.kernels.gsa.settings import Settings, settings
from fla_dist.kernels.gsa.triton_kernels import (
    decay_gradient_kernel,
    gather_kernel,
    source_gradient_kernel,
    spread_kernel,
    summarize_kernel,
)
from fla_dist.kernels.state import RESET


def _settings(k: Tensor, v: Tensor, g: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment."""
    sizes = g.shape[-1], k.shape[-1], v.shape[-1]
    chosen = settings(launches.capability(k), *sizes, k.element_size())
    batch, length, heads, _ = v.shape
    return chosen, segment_length(
        batch, length, heads, chosen.chunk, chosen.programs, chosen.longest
    )


def _walk(chosen: Settings, launch: Launch, x: Tensor, g: Tensor, packed: bool) -> dict[str, Any]:
    """What every kernel that walks the chunks is compiled with."""
    return {
        "C": chosen.chunk, "LEVELS": chosen.chunk.bit_length() - 1,
        "BM": padded(g.shape[-1], x.element_size()), "PACKED": packed, "PRECISION": precision(x),
        **launch.options(),
    }  # fmt: skip


def _summarize(
    weights: tuple[Tensor, Tensor] | tuple[None, None],
    sources: tuple[Tensor, Tensor],
    g: Tensor,
    doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, slots = g.shape
    chosen, segment = _settings(*sources, g)
    count, width = -(-length // segment), sources[0].shape[-1] + sources[1].shape[-1]
    state = g.new_empty(batch, count, heads, slots, width, dtype=torch.float32)
    log_decay = g.new_empty(batch, count, heads, slots, 1, dtype=torch.float32)
    spans = _spans(chosen.chunk, _span_types(sources[0].dtype)[0], g.device)
    launch, offset = chosen.summarize, 0
    for c, z, factor in zip(weights, sources, (scale, 1.0), strict=True):
        size = z.shape[-1]
        block = min(padded(size, z.element_size()), launch.block)
        summarize_kernel[(triton.cdiv(size, block), count, batch * heads)](
            c, z, g, doc_ids, spans, state, log_decay,
            length, heads, slots, size, width, offset, segment, factor, *strides(z), *strides(g),
            RESET=RESET, BX=block, REVERSE=c is not None,
            **_walk(chosen, launch, z, g, doc_ids is not None),
        )  # fmt: skip
        offset += size
    return state, log_decay


@step("fla_dist::gsa_summarize")
def summarize(k: Tensor, v: Tensor, g: Tensor, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, M, W], and its log decays, [B, S, H, M, 1]."""
    return _summarize((None, None), (k, v), g, doc_ids, 1.0)


@summarize.register_fake
def _(k, v, g, doc_ids):
    batch, length, heads, slots = g.shape
    shape = batch, -(-length // _settings(k, v, g)[1]), heads, slots
    return (
        g.new_empty(*shape, k.shape[-1] + v.shape[-1], dtype=torch.float32),
        g.new_empty(*shape, 1, dtype=torch.float32),
    )


@step("fla_dist::gsa_summarize_gradient")
def summarize_gradient(
    q: Tensor,
    do: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    gradients: Tensor,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """What each segment's tokens give the gradient of the state that enters it."""
    return _summarize((gradients, weights), (q, do), g, doc_ids, scale)[0]


@summarize_gradient.register_fake
def _(q, do, g, doc_ids, gradients, weights, scale):
    batch, length, heads, slots = g.shape
    count, width = -(-length // _settings(q, do, g)[1]), q.shape[-1] + do.shape[-1]
    return g.new_empty(batch, count, heads, slots, width, dtype=torch.float32)


def _of_slots(x: Tensor, g: Tensor, *first: int) -> Tensor:
    batch, length, heads, slots = g.shape
    return x.new_empty(*first, batch, heads, length, slots)


def _of_pairs(x: Tensor, g: Tensor, chunk: int) -> Tensor:
    return x.new_empty(g.shape[0], g.shape[2], g.shape[1], chunk)


def _of_chunks(g: Tensor, chunk: int) -> Tensor:
    batch, length, heads, slots = g.shape
    return g.new_empty(2, batch, heads, -(-length // chunk), slots, dtype=torch.float32)


def _gather(
    a: Tensor, b: Tensor, g: Tensor, doc_ids: Tensor | None, state: Tensor, offset: int,
    weights: Tensor, inherited: Tensor, gradients: Tensor | None, exponents: Tensor | None,
    sums: Tensor | None, chosen: Settings, segment: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The products and the scores of the pairs."""
    batch, length, heads, slots = g.shape
    products, scores = _of_pairs(a, g, chosen.chunk), _of_pairs(a, g, chosen.chunk)
    gather_kernel[(state.shape[1], batch * heads)](
        a, b, g, doc_ids, _spans(chosen.chunk, _span_types(a.dtype)[0], g.device), state,
        weights, inherited, gradients, exponents, sums, products, scores,
        length, heads, slots, a.shape[-1], state.shape[-1], offset, segment, scale,
        *strides(a), *strides(b), *strides(g),
        BX=padded(a.shape[-1], a.element_size()), BACKWARD=gradients is not None,
        **_walk(chosen, chosen.gather, a, g, doc_ids is not None),
    )  # fmt: skip
    return products, scores


def _spread(
    c: Tensor, z: Tensor, g: Tensor, doc_ids: Tensor | None, scores: Tensor, state: Tensor,
    offset: int, chosen: Settings, segment: int, scale: float,
) -> Tensor:  # fmt: skip
    batch, length, heads, slots = g.shape
    size, launch, out = z.shape[-1], chosen.spread, z.new_empty(z.shape)
    block = min(padded(size, z.element_size()), launch.block)
    spread_kernel[(triton.cdiv(size, block), state.shape[1], batch * heads)](
        c, z, g, doc_ids, _spans(chosen.chunk, _span_types(z.dtype)[0], g.device), scores, state,
        out, length, heads, slots, size, state.shape[-1], offset, segment, scale,
        *strides(z), *strides(g),
        BX=block, **_walk(chosen, launch, z, g, doc_ids is not None),
    )  # fmt: skip
    return out


@step("fla_dist::gsa_output")
def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    entering: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V] from the states that enter the segments; the softmax' weights and the part of
    its arguments that came with the state, both [B, H, T, M]; products and scores of the pairs,
    [B, H, T, C]."""
    chosen, segment = _settings(k, v, g)
    weights, inherited = _of_slots(q, g), _of_slots(q, g)
    products, scores = _gather(
        q, k, g, doc_ids, entering, 0, weights, inherited, None, None, None, chosen, segment, scale
    )
    o = _spread(weights, v, g, doc_ids, scores, entering, k.shape[-1], chosen, segment, 1.0)
    return o, weights, inherited, products, scores


@output.register_fake
def _(q, k, v, g, doc_ids, entering, scale):
    chunk = _settings(k, v, g)[0].chunk
    slots, pairs = (_of_slots(q, g) for _ in range(2)), (_of_pairs(q, g, chunk) for _ in range(2))
    return v.new_empty(v.shape), *slots, *pairs


@step("fla_dist::gsa_softmax_gradient")
def softmax_gradient(
    do: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    weights: Tensor,
    inherited: Tensor,
    entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the softmax' arguments and of the exponents G_t, both [B, H, T, M], the
    latter's sums over chunks of keys and of values, [2, B, H, N, M]; products and scores of the
    pairs."""
    chosen, segment = _settings(k, v, g)
    gradients, exponents = _of_slots(do, g), _of_slots(do, g)
    sums = _of_chunks(g, chosen.chunk)
    pairs = _gather(
        do, v, g, doc_ids, entering, k.shape[-1], weights, inherited, gradients, exponents, sums,
        chosen, segment, 1.0,
    )  # fmt: skip
    return gradients, exponents, sums, *pairs


@softmax_gradient.register_fake
def _(do, k, v, g, doc_ids, weights, inherited, entering):
    chunk = _settings(k, v, g)[0].chunk
    slots, pairs = (_of_slots(v, g) for _ in range(2)), (_of_pairs(v, g, chunk) for _ in range(2))
    return *slots, _of_chunks(g, chunk), *pairs


@step("fla_dist::gsa_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    weights: Tensor,
    gradients: Tensor,
    exponents: Tensor,
    sums: Tensor,
    key_products: Tensor,
    key_scores: Tensor,
    value_products: Tensor,
    value_scores: Tensor,
    entering: Tensor,
    final: Tensor,
    leaving_gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dg from the states that enter the segments and the gradients of those that leave
    them. `key_scores` are those with which keys were spread to dq: of the gradients."""
    batch, length, heads, slots = g.shape
    chosen, segment = _settings(k, v, g)
    span_type, gradient_type = _span_types(q.dtype)
    spans = _spans(chosen.chunk, span_type, g.device)
    dq = _spread(gradients, k, g, doc_ids, key_scores, entering, 0, chosen, segment, scale)
    dk, dv, dg = k.new_empty(k.shape), v.new_empty(v.shape), g.new_empty(g.shape)
    taken_gradient, carries = _of_slots(q, g, 2), torch.empty_like(sums)
    for side, (a, c, z, scores, dz, factor) in enumerate(
        (
            (q, gradients, k, key_scores, dk, scale),
            (do, weights, v, value_scores, dv, 1.0),
        )
    ):
        source_gradient_kernel[(entering.shape[1], batch * heads)](
            a, c, z, g, doc_ids, spans, scores, leaving_gradient, entering, final, sums[side], dz,
            taken_gradient[side], carries[side],
            length, heads, slots, z.shape[-1], entering.shape[-1], side * k.shape[-1], segment,
            factor, *strides(a), *strides(z), *strides(g),
            BX=padded(z.shape[-1], z.element_size()),
            **_walk(chosen, chosen.source_gradient, z, g, doc_ids is not None),
        )  # fmt: skip
    launch = chosen.decay_gradient
    block = min(padded(slots, q.element_size()), launch.block)
    decay_gradient_kernel[(carries.shape[3], triton.cdiv(slots, block), batch * heads)](
        g, weights, gradients, exponents, taken_gradient, carries, key_products, value_products,
        spans, _spans(chosen.chunk, gradient_type, g.device), dg,
        length, heads, slots, *strides(g),
        C=chosen.chunk, LEVELS=chosen.chunk.bit_length() - 1, BM=block, PRECISION=precision(q),
        **launch.options(),
    )  # fmt: skip
    return dq, dk, dv, dg


@backward.register_fake
def _(
    q, k, v, do, g, doc_ids, weights, gradients, exponents, sums, key_products, key_scores,
    value_products, value_scores, entering, final, leaving_gradient, scale,
):  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), g.new_empty(g.shape)
