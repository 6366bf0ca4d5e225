"""The steps of the gated delta rule as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import Launch, floats, padded, precision, step, strides
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gated_delta_rule.settings import Settings, settings
from fla_dist.kernels.gated_delta_rule.triton_kernels import (
    crossing_kernel,
    decay_gradient_kernel,
    key_gradient_kernel,
    pair_gradient_kernel,
    prepare_kernel,
    value_gradient_kernel,
    value_walk_kernel,
)
from fla_dist.kernels.simple_gla.triton_kernels import NO_DECAY, TOKEN_DECAY

CROSSING_CHUNKS = 64
"""Chunks that the crossing kernel takes at a time."""


def _settings(q: Tensor, v: Tensor) -> Settings:
    return settings(launches.capability(q), q.shape[-1], v.shape[-1], q.element_size())


def _segment(q: Tensor, v: Tensor) -> int:
    """Tokens of a segment."""
    batch, length, heads, _ = v.shape
    chosen = _settings(q, v)
    return segment_length(batch, length, heads, chosen.chunk, chosen.programs, length)


def segments(q: Tensor, v: Tensor) -> int:
    return -(-v.shape[1] // _segment(q, v))


def _sizes(q: Tensor, v: Tensor) -> tuple[int, int, int]:
    """T, H, and the value heads of a key head."""
    return v.shape[1], v.shape[2], v.shape[2] // q.shape[2]


@step("fla_dist::gated_delta_rule_prepare")
def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Y and the scores [B, H, T, C], the weights [5 | 2, B, H, T], and the decay over each chunk
    [B, H, N], or an empty tensor where nothing decays or restarts; of v only the shape matters."""
    batch, length, heads, _ = v.shape
    key_size, chosen = q.shape[-1], _settings(q, v)
    count, decay = triton.cdiv(length, chosen.chunk), g is not None or doc_ids is not None
    inverse, scores = (q.new_empty(batch, heads, length, chosen.chunk) for _ in range(2))
    weights = floats(q, 5 if decay else 2, batch, heads, length)
    through = floats(q, batch, heads, count if decay else 0)
    prepare_kernel[(count, 1, batch * heads)](
        q, k, g, beta, doc_ids, inverse, scores, weights, through,
        *_sizes(q, v), scale,
        *strides(q), *strides(k), *((0, 0, 0) if g is None else g.stride()), *beta.stride(),
        C=chosen.chunk, K=key_size, BK=min(padded(key_size, q.element_size()), chosen.pairs.block),
        DECAY=decay, GATES=(NO_DECAY if g is None else TOKEN_DECAY).value,
        PACKED=doc_ids is not None, PRECISION=precision(q), **chosen.pairs.options(),
    )  # fmt: skip
    return inverse, scores, weights, through


@prepare.register_fake
def _(q, k, v, g, beta, doc_ids, scale):
    batch, length, heads, _ = v.shape
    chunk, decay = _settings(q, v).chunk, g is not None or doc_ids is not None
    inverse, scores = (q.new_empty(batch, heads, length, chunk) for _ in range(2))
    weights = floats(q, 5 if decay else 2, batch, heads, length)
    return inverse, scores, weights, floats(q, batch, heads, -(-length // chunk) if decay else 0)


def _value_walk(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor | None, entering: Tensor | None, leaving: Tensor, transition: Tensor | None,
    o: Tensor | None, written: Tensor | None, scale: float, launch: Launch,
) -> None:  # fmt: skip
    batch, _, heads, value_size = v.shape
    key_size, itemsize = q.shape[-1], q.element_size()
    block = min(padded(value_size, itemsize), launch.block)
    blocks = triton.cdiv(value_size, block)
    if transition is not None:
        blocks += triton.cdiv(key_size, block)
    value_walk_kernel[(blocks, segments(q, v), batch * heads)](
        q, k, v, weights, through, inverse, scores, entering, leaving, transition, o, written,
        *_sizes(q, v), _segment(q, v), scale, *strides(q), *strides(k), *strides(v),
        C=inverse.shape[-1], K=key_size, V=value_size, BK=padded(key_size, itemsize), BV=block,
        DECAY=through.shape[-1] > 0, SUMMARIZE=transition is not None, STAGES=launch.stages,
        PRECISION=precision(q), **launch.options(),
    )  # fmt: skip


@step("fla_dist::gated_delta_rule_summarize")
def summarize(
    k: Tensor, v: Tensor, weights: Tensor, through: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Each segment's state from zero [B, S, H, K, V], and its transition [B, S, H, K, K]."""
    shape = (v.shape[0], segments(k, v), v.shape[2], k.shape[-1])
    state, transition = floats(v, *shape, v.shape[-1]), floats(v, *shape, k.shape[-1])
    _value_walk(
        k, k, v, weights, through, inverse, None, None, state, transition, None, None, 1.0,
        _settings(k, v).summarize,
    )  # fmt: skip
    return state, transition


@summarize.register_fake
def _(k, v, weights, through, inverse):
    shape = (v.shape[0], segments(k, v), v.shape[2], k.shape[-1])
    return floats(v, *shape, v.shape[-1]), floats(v, *shape, k.shape[-1])


@step("fla_dist::gated_delta_rule_output")
def output(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor, entering: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o and `written` [B, T, H, V], and the state after the last token, from the states that
    enter the segments."""
    o, written, final = (
        v.new_empty(v.shape),
        v.new_empty(v.shape),
        entering.new_empty(entering[:, 0].shape),
    )
    _value_walk(
        q, k, v, weights, through, inverse, scores, entering, final, None, o, written, scale,
        _settings(q, v).output,
    )  # fmt: skip
    return o, written, final


@output.register_fake
def _(q, k, v, weights, through, inverse, scores, entering, scale):
    return v.new_empty(v.shape), v.new_empty(v.shape), entering.new_empty(entering[:, 0].shape)


@step("fla_dist::gated_delta_rule_summarize_gradient")
def summarize_gradient(
    q: Tensor, k: Tensor, do: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """What each segment's own outputs give the gradient of its entering state, [B, S, H, K, V]."""
    batch, _, heads, value_size = do.shape
    gradient = floats(do, batch, segments(q, do), heads, q.shape[-1], value_size)
    launch = _settings(q, do).summarize_gradient
    block = min(padded(value_size, q.element_size()), launch.block)
    value_gradient_kernel[(triton.cdiv(value_size, block), segments(q, do), batch * heads)](
        q, k, do, weights, through, inverse, scores, None, None, gradient, None, None, None, None,
        None, *_sizes(q, do), _segment(q, do), scale, *strides(q), *strides(k), *strides(do),
        BV=block, SUMMARIZE=True, SUMS=False, PARTS=1, **_common(q, do, through, launch),
    )  # fmt: skip
    return gradient


@summarize_gradient.register_fake
def _(q, k, do, weights, through, inverse, scores, scale):
    batch, _, heads, value_size = do.shape
    return floats(do, batch, segments(q, do), heads, q.shape[-1], value_size)


def _common(q: Tensor, do: Tensor, through: Tensor, launch: Launch) -> dict[str, Any]:
    key_size, value_size = q.shape[-1], do.shape[-1]
    return {
        "C": _settings(q, do).chunk, "K": key_size, "V": value_size,
        "BK": padded(key_size, q.element_size()), "DECAY": through.shape[-1] > 0,
        "STAGES": launch.stages, "PRECISION": precision(q), **launch.options(),
    }  # fmt: skip


@step("fla_dist::gated_delta_rule_gradients")
def gradients(
    q: Tensor, k: Tensor, do: Tensor, written: Tensor, weights: Tensor, through: Tensor,
    inverse: Tensor, scores: Tensor, doc_ids: Tensor | None, entering: Tensor,
    leaving_gradient: Tensor, scale: float, with_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq and dk of each value head [B, T, H, K], dv, dg (empty unless `with_gates`) and dβ
    [B, T, H] fp32, and the gradient of the state that enters the first segment, from the states
    that enter the segments and the gradients of those that leave them."""
    batch, length, heads, value_size = do.shape
    key_size, itemsize, chosen = q.shape[-1], q.element_size(), _settings(q, do)
    count, rows, stretches = triton.cdiv(length, chosen.chunk), batch * heads, segments(q, do)
    wide_key, wide_value = padded(key_size, itemsize), padded(value_size, itemsize)
    value_block = min(wide_value, chosen.value_gradient.block)
    key_block = min(wide_key, chosen.key_gradient.block)
    value_blocks, key_blocks = (
        triton.cdiv(value_size, value_block),
        triton.cdiv(key_size, key_block),
    )
    sizes = (*_sizes(q, do), _segment(q, do), scale)
    where = (*strides(q), *strides(k), *strides(do))

    def sums(*shape: int) -> Tensor:
        return floats(q, *(shape if with_gates else (0,)))

    parts_of_states = 2 if with_gates and precision(q) != "ieee" else 1
    dk, dv = q.new_empty(batch, length, heads, key_size), torch.empty_like(written)
    dk_others = q.new_empty(value_blocks - 1, batch, length, heads, key_size)
    parts = value_blocks * value_block // 16
    beta_sums = floats(q, parts, batch, heads, length)
    after_sums = sums(parts, batch, heads, length)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    value_gradient_kernel[(value_blocks, stretches, rows)](
        q, k, do, weights, through, inverse, scores, written, leaving_gradient, initial_gradient,
        dv, dk, dk_others, beta_sums, after_sums, *sizes, *where,
        BV=value_block, SUMMARIZE=False, SUMS=with_gates, PARTS=parts_of_states,
        **_common(q, do, through, chosen.value_gradient),
    )  # fmt: skip

    query_pairs, key_pairs = torch.empty_like(scores), torch.empty_like(scores)
    dbeta = floats(q, batch, length, heads)
    pair_sums, after = (sums(batch, heads, length) for _ in range(2))
    pair_gradient_kernel[(count, 1, rows)](
        k, do, dv, written, weights, scores, doc_ids, beta_sums, after_sums,
        query_pairs, key_pairs, dbeta, pair_sums, after,
        *_sizes(q, do), scale, parts, *strides(k), *strides(do),
        C=chosen.chunk, K=key_size, V=value_size, BK=min(wide_key, chosen.pairs.block),
        BV=min(wide_value, chosen.pairs.block), DECAY=through.shape[-1] > 0,
        PACKED=doc_ids is not None, SUMS=with_gates, PRECISION=precision(q),
        **chosen.pairs.options(),
    )  # fmt: skip
    del beta_sums, after_sums

    dq = torch.empty_like(dk)
    parts = key_blocks * key_block // 16
    state_sums = sums(parts, batch, heads, length)
    options = _common(q, do, through, chosen.key_gradient) | {"BK": key_block, "BV": wide_value}
    key_gradient_kernel[(key_blocks, stretches, rows)](
        q, k, do, dv, written, weights, through, query_pairs, key_pairs, entering,
        dq, dk, dk_others, state_sums, *sizes, value_blocks, *where, SUMS=with_gates,
        PARTS=parts_of_states, **options,
    )  # fmt: skip
    if not with_gates:
        return dq, dk, dv, floats(q, 0), dbeta, initial_gradient

    dg, across = floats(q, batch, length, heads), floats(q, batch, heads, count)
    crossing_kernel[(1, stretches, rows)](
        through, after, state_sums, entering, leaving_gradient, initial_gradient, across,
        length, heads, _segment(q, do), parts,
        C=chosen.chunk, CHUNKS=CROSSING_CHUNKS, K=key_size, V=value_size,
        BK=max(16, 8192 // wide_value), BV=wide_value, EXACT=precision(q) == "ieee", num_warps=8,
    )  # fmt: skip
    decay_gradient_kernel[(count, 1, rows)](
        pair_sums, state_sums, after, across, doc_ids, dg, length, heads, parts,
        C=chosen.chunk, PACKED=doc_ids is not None, num_warps=2,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, initial_gradient


@gradients.register_fake
def _(
    q, k, do, written, weights, through, inverse, scores, doc_ids, entering, leaving_gradient,
    scale, with_gates,
):  # fmt: skip
    batch, length, heads, _ = do.shape
    dq, dk = (q.new_empty(batch, length, heads, q.shape[-1]) for _ in range(2))
    dg = floats(q, *((batch, length, heads) if with_gates else (0,)))
    dbeta = floats(q, batch, length, heads)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    return dq, dk, torch.empty_like(written), dg, dbeta, initial_gradient
