"""The steps of GSA as torch.library ops: tensors in, tensors out. Notation of triton_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.launch import Launch, padded, precision, step, strides
from fla_dist.kernels.common.levels import identity, spans
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gsa.settings import Settings, settings
from fla_dist.kernels.gsa.triton_kernels import (
    decay_gradient_kernel,
    gather_kernel,
    prepare_kernel,
    score_kernel,
    source_gradient_kernel,
    spread_kernel,
    summarize_kernel,
)
from fla_dist.kernels.state import RESET


def _settings(k: Tensor, v: Tensor, of_slots: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment; `of_slots` [..., M]."""
    chosen = settings(k.shape[-1], v.shape[-1], of_slots.shape[-1], k.element_size())
    batch, length, heads, _ = v.shape
    return chosen, segment_length(
        batch, length, heads, chosen.chunk, chosen.programs, chosen.longest
    )


def _unit_type(dtype: torch.dtype) -> torch.dtype:
    """Of numbers from 0 to 1: fp16 keeps three bits more of them than bf16."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _identity(chosen: Settings, x: Tensor) -> Tensor:
    return identity(chosen.chunk, _unit_type(x.dtype), x.device)


def _compiled(chosen: Settings, launch: Launch, x: Tensor, slots: int) -> dict[str, Any]:
    """What every kernel is compiled with."""
    return {
        "C": chosen.chunk, "BM": padded(slots, x.element_size()), "PRECISION": precision(x),
        **launch.options(),
    }  # fmt: skip


def _walk(chosen: Settings, launch: Launch, x: Tensor, slots: int) -> dict[str, Any]:
    """And those that walk the chunks."""
    return {"STAGES": launch.stages, **_compiled(chosen, launch, x, slots)}


def _levels(chosen: Settings) -> int:
    return chosen.chunk.bit_length() - 1


@step("fla_dist::gsa_prepare")
def prepare(
    a: Tensor, b: Tensor, g: Tensor, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """decay_in and taken_out [B, H, T, M], the chunks' log decays [B, H, N, M], the products of the
    pairs [B, H, T, C], and what a gathers inside the chunk [B, H, T, M]."""
    batch, length, heads, slots = g.shape
    chosen, _ = _settings(a, b, g)
    launch, chunks = chosen.prepare, -(-length // chosen.chunk)
    taken_out, inside = (a.new_empty(batch, heads, length, slots) for _ in range(2))
    decay_in = torch.empty_like(inside, dtype=_unit_type(a.dtype))
    chunk_decay = a.new_empty(batch, heads, chunks, slots, dtype=torch.float32)
    products = a.new_empty(batch, heads, length, chosen.chunk)
    size = a.shape[-1]
    prepare_kernel[(chunks * heads, batch)](
        a, b, g, doc_ids, _identity(chosen, a),
        decay_in, taken_out, chunk_decay, products, inside,
        length, heads, slots, size, scale, *strides(a), *strides(b), *strides(g),
        RESET=RESET, LEVELS=_levels(chosen), BX=min(padded(size, a.element_size()), launch.block),
        PACKED=doc_ids is not None, **_compiled(chosen, launch, a, slots),
    )  # fmt: skip
    return decay_in, taken_out, chunk_decay, products, inside


@prepare.register_fake
def _(a, b, g, doc_ids, scale):
    batch, length, heads, slots = g.shape
    chunk = _settings(a, b, g)[0].chunk
    taken_out, inside = (a.new_empty(batch, heads, length, slots) for _ in range(2))
    decay_in = torch.empty_like(inside, dtype=_unit_type(a.dtype))
    decay = a.new_empty(batch, heads, -(-length // chunk), slots, dtype=torch.float32)
    return decay_in, taken_out, decay, a.new_empty(batch, heads, length, chunk), inside


@step("fla_dist::gsa_summarize")
def summarize(
    y_keys: Tensor,
    y_values: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk_decay: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, M, W], and its log decays, [B, S, H, M, 1], of
    taken_out twice, k, v; or in reverse, the log decays left unwritten, of both c_in, q, do."""
    batch, heads, length, slots = y_keys.shape
    chosen, segment = _settings(keys, values, y_keys)
    count, width = -(-length // segment), keys.shape[-1] + values.shape[-1]
    state = keys.new_empty(batch, count, heads, slots, width, dtype=torch.float32)
    log_decay = keys.new_empty(batch, count, heads, slots, 1, dtype=torch.float32)
    launch = chosen.summarize
    for y, z, offset in ((y_keys, keys, 0), (y_values, values, keys.shape[-1])):
        size = z.shape[-1]
        block = min(padded(size, z.element_size()), launch.block)
        summarize_kernel[(-(-size // block), count, batch * heads)](
            y, z, chunk_decay, state, log_decay,
            length, heads, slots, size, width, offset, segment, *strides(z),
            BX=block, REVERSE=reverse, **_walk(chosen, launch, z, slots),
        )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(y_keys, y_values, keys, values, chunk_decay, reverse):
    batch, heads, length, slots = y_keys.shape
    shape = batch, -(-length // _settings(keys, values, y_keys)[1]), heads, slots
    return (
        keys.new_empty(*shape, keys.shape[-1] + values.shape[-1], dtype=torch.float32),
        keys.new_empty(*shape, 1, dtype=torch.float32),
    )


def _gather(
    a: Tensor, b: Tensor, decay_in: Tensor, taken_out: Tensor, chunk_decay: Tensor, inside: Tensor,
    state: Tensor, offset: int, weights: Tensor | None, inherited: Tensor,
    exponents: Tensor | None, sums: Tensor | None, chosen: Settings, segment: int, scale: float,
    out_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, length, slots = inside.shape
    backward = weights is not None
    out = torch.empty_like(inside, dtype=inside.dtype if backward else decay_in.dtype)
    out_in = torch.empty_like(inside)
    gather_kernel[(state.shape[1], batch * heads)](
        a, b, decay_in, taken_out, chunk_decay, inside, state, weights, inherited, out, out_in,
        exponents, sums,
        length, heads, slots, a.shape[-1], state.shape[-1], offset, segment, scale, out_scale,
        *strides(a), *strides(b),
        BX=padded(a.shape[-1], a.element_size()), BACKWARD=backward,
        **_walk(chosen, chosen.gather, a, slots),
    )  # fmt: skip
    return out, out_in


def _scores(
    c: Tensor, g: Tensor, doc_ids: Tensor | None, dtype: torch.dtype, chosen: Settings
) -> Tensor:
    batch, heads, length, slots = c.shape
    scores = c.new_empty(batch, heads, length, chosen.chunk, dtype=dtype)
    score_kernel[(-(-length // chosen.chunk) * heads, batch)](
        c, g, doc_ids, _identity(chosen, c), scores,
        length, heads, slots, *strides(g),
        LEVELS=_levels(chosen), PACKED=doc_ids is not None,
        **_compiled(chosen, chosen.scores, c, slots),
    )  # fmt: skip
    return scores


def _spread(
    a: Tensor | None, c_in: Tensor, z: Tensor, taken_out: Tensor, chunk_decay: Tensor,
    scores: Tensor, state: Tensor, offset: int, chosen: Settings, segment: int, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What c_in and the scores spread of z; with `a`, also the sums for dg [B, H, N, M]."""
    batch, heads, length, slots = c_in.shape
    size, launch, out = z.shape[-1], chosen.spread, z.new_empty(z.shape)
    block = min(padded(size, z.element_size()), launch.block)
    blocks = -(-size // block)
    sums = None if a is None else chunk_decay.new_empty(blocks, *chunk_decay.shape)
    spread_kernel[(blocks, state.shape[1], batch * heads)](
        a, c_in, z, taken_out, chunk_decay, scores, state, out, sums,
        length, heads, slots, size, state.shape[-1], offset, segment, scale,
        *strides(z if a is None else a), *strides(z),
        BX=block, BACKWARD=a is not None, **_walk(chosen, launch, z, slots),
    )  # fmt: skip
    return out, None if sums is None else sums.sum(0) if blocks > 1 else sums[0]


@step("fla_dist::gsa_output")
def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    decay_in: Tensor,
    taken_out: Tensor,
    chunk_decay: Tensor,
    inside: Tensor,
    entering: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V] from the states that enter the segments; the softmax' weights, these times
    decay_in, and the part of its arguments that came with the state, all [B, H, T, M]; the scores
    of the pairs, [B, H, T, C]."""
    chosen, segment = _settings(k, v, g)
    inherited = torch.empty_like(inside)
    weights, weights_in = _gather(
        q, k, decay_in, taken_out, chunk_decay, inside, entering, 0, None, inherited, None, None,
        chosen, segment, scale, 1.0,
    )  # fmt: skip
    scores = _scores(weights, g, doc_ids, v.dtype, chosen)
    o, _ = _spread(
        None, weights_in, v, taken_out, chunk_decay, scores, entering, k.shape[-1], chosen, segment,
        1.0,
    )  # fmt: skip
    return o, weights, weights_in, inherited, scores


@output.register_fake
def _(q, k, v, g, doc_ids, decay_in, taken_out, chunk_decay, inside, entering, scale):
    chunk = _settings(k, v, g)[0].chunk
    of_slots = (torch.empty_like(x) for x in (decay_in, inside, inside))
    return v.new_empty(v.shape), *of_slots, inside.new_empty(*inside.shape[:3], chunk)


@step("fla_dist::gsa_softmax_gradient")
def softmax_gradient(
    do: Tensor,
    k: Tensor,
    v: Tensor,
    decay_in: Tensor,
    taken_out: Tensor,
    chunk_decay: Tensor,
    inside: Tensor,
    entering: Tensor,
    weights: Tensor,
    inherited: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the softmax' arguments, these times scale · decay_in, and the gradients of
    the exponents G_t, all [B, H, T, M]; the sums of the values' side [B, H, N, M]."""
    chosen, segment = _settings(k, v, decay_in)
    exponents, sums = torch.empty_like(inside), torch.empty_like(chunk_decay)
    gradients, gradients_in = _gather(
        do, v, decay_in, taken_out, chunk_decay, inside, entering, k.shape[-1], weights, inherited,
        exponents, sums, chosen, segment, 1.0, scale,
    )  # fmt: skip
    return gradients, gradients_in, exponents, sums


@softmax_gradient.register_fake
def _(do, k, v, decay_in, taken_out, chunk_decay, inside, entering, weights, inherited, scale):
    of_slots = (torch.empty_like(inside) for _ in range(3))
    return *of_slots, torch.empty_like(chunk_decay)


@step("fla_dist::gsa_query_gradient")
def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    taken_out: Tensor,
    chunk_decay: Tensor,
    gradients: Tensor,
    gradients_in: Tensor,
    entering: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq from the states that enter the segments; the scores of the pairs of keys [B, H, T, C] and
    the sums of their side [B, H, N, M]."""
    chosen, segment = _settings(k, v, g)
    scores = _scores(gradients, g, doc_ids, k.dtype, chosen)
    dq, sums = _spread(
        q, gradients_in, k, taken_out, chunk_decay, scores, entering, 0, chosen, segment, scale
    )
    assert sums is not None
    return dq, scores, sums


@query_gradient.register_fake
def _(
    q, k, v, g, doc_ids, taken_out, chunk_decay, gradients, gradients_in, entering, scale
):  # fmt: skip
    chunk = _settings(k, v, g)[0].chunk
    scores = gradients.new_empty(*gradients.shape[:3], chunk, dtype=k.dtype)
    return q.new_empty(q.shape), scores, torch.empty_like(chunk_decay)


@step("fla_dist::gsa_source_gradients")
def source_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    taken_out: Tensor,
    chunk_decay: Tensor,
    weights_in: Tensor,
    scores: Tensor,
    gradients_in: Tensor,
    key_scores: Tensor,
    key_sums: Tensor,
    value_sums: Tensor,
    entering: Tensor,
    final: Tensor,
    leaving_gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dk, dv from the gradients of the states that leave the segments; and for dg the gradient of
    taken_out [B, H, T, M] and the carries over whole chunks, of keys and of values,
    [2, B, H, N, M]."""
    batch, heads, length, slots = taken_out.shape
    chosen, segment = _settings(k, v, taken_out)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    taken_gradient = torch.empty_like(taken_out)
    carries = chunk_decay.new_empty(2, *chunk_decay.shape)
    for side, (a, c_in, z, of_pairs, sums, dz, factor) in enumerate(
        (
            (q, gradients_in, k, key_scores, key_sums, dk, scale),
            (do, weights_in, v, scores, value_sums, dv, 1.0),
        )
    ):
        source_gradient_kernel[(entering.shape[1], batch * heads)](
            a, c_in, z, taken_out, chunk_decay, of_pairs, leaving_gradient, entering, final,
            sums, dz, taken_gradient, carries[side],
            length, heads, slots, z.shape[-1], entering.shape[-1], side * k.shape[-1], segment,
            factor, *strides(a), *strides(z),
            BX=padded(z.shape[-1], z.element_size()), ADD=side == 1,
            **_walk(chosen, chosen.source_gradient, z, slots),
        )  # fmt: skip
    return dk, dv, taken_gradient, carries


@source_gradients.register_fake
def _(
    q, k, v, do, taken_out, chunk_decay, weights_in, scores, gradients_in, key_scores, key_sums,
    value_sums, entering, final, leaving_gradient, scale,
):  # fmt: skip
    rows = (x.new_empty(x.shape) for x in (k, v))
    return *rows, torch.empty_like(taken_out), chunk_decay.new_empty(2, *chunk_decay.shape)


@step("fla_dist::gsa_decay_gradient")
def decay_gradient(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    doc_ids: Tensor | None,
    weights: Tensor,
    gradients: Tensor,
    exponents: Tensor,
    taken_gradient: Tensor,
    carries: Tensor,
    key_products: Tensor,
    value_products: Tensor,
) -> Tensor:
    """dg [B, T, H, M]."""
    batch, length, heads, slots = g.shape
    chosen, _ = _settings(k, v, g)
    launch, dg = chosen.decay_gradient, g.new_empty(g.shape)
    of_pairs = identity(chosen.chunk, k.dtype, g.device)
    gradient_spans = spans(chosen.chunk, k.dtype, g.device)
    compiled = _compiled(chosen, launch, k, slots)
    compiled["BM"] = min(compiled["BM"], launch.block)
    blocks = -(-slots // compiled["BM"])
    decay_gradient_kernel[(carries.shape[3] * heads * blocks, batch)](
        g, weights, gradients, exponents, taken_gradient, carries, key_products, value_products,
        doc_ids, _identity(chosen, k), of_pairs, gradient_spans, dg,
        length, heads, slots, *strides(g),
        LEVELS=_levels(chosen), BLOCKS=blocks, PACKED=doc_ids is not None, **compiled,
    )  # fmt: skip
    return dg


@decay_gradient.register_fake
def _(
    k, v, g, doc_ids, weights, gradients, exponents, taken_gradient, carries, key_products,
    value_products,
):  # fmt: skip
    return g.new_empty(g.shape)
