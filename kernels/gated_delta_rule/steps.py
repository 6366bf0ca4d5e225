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
    decay_gradient_kernel,
    key_gradient_kernel,
    pair_gradient_kernel,
    prepare_kernel,
    query_gradient_kernel,
    value_gradient_kernel,
    value_walk_kernel,
)
from fla_dist.kernels.simple_gla.triton_kernels import NO_DECAY, TOKEN_DECAY


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


def _options(launch: Launch) -> dict[str, Any]:
    return {"num_warps": launch.warps, "num_stages": launch.stages}


@step("fla_dist::gated_delta_rule_prepare")
def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Y and the scores [B, H, T, C], the weights [4, B, H, T], and the decay over each chunk
    [B, H, N], or an empty tensor where nothing decays or restarts; of v only the shape matters."""
    batch, length, heads, _ = v.shape
    key_size, chosen = q.shape[-1], _settings(q, v)
    count, decay = triton.cdiv(length, chosen.chunk), g is not None or doc_ids is not None
    inverse, scores = (q.new_empty(batch, heads, length, chosen.chunk) for _ in range(2))
    weights = floats(q, 4, batch, heads, length)
    through = floats(q, batch, heads, count if decay else 0)
    prepare_kernel[(count, 1, batch * heads)](
        q, k, g, beta, doc_ids, inverse, scores, weights, through,
        *_sizes(q, v), scale,
        *strides(q), *strides(k), *((0, 0, 0) if g is None else g.stride()), *beta.stride(),
        C=chosen.chunk, K=key_size, BK=min(padded(key_size, q.element_size()), chosen.pairs.block),
        DECAY=decay, GATES=(NO_DECAY if g is None else TOKEN_DECAY).value,
        PACKED=doc_ids is not None, PRECISION=precision(q), **_options(chosen.pairs),
    )  # fmt: skip
    return inverse, scores, weights, through


@prepare.register_fake
def _(q, k, v, g, beta, doc_ids, scale):
    batch, length, heads, _ = v.shape
    chunk = _settings(q, v).chunk
    count = 0 if g is None and doc_ids is None else -(-length // chunk)
    inverse, scores = (q.new_empty(batch, heads, length, chunk) for _ in range(2))
    return inverse, scores, floats(q, 4, batch, heads, length), floats(q, batch, heads, count)


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
        PRECISION=precision(q), **_options(launch),
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


def _value_gradient(
    q: Tensor, k: Tensor, do: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor, written: Tensor | None, leaving: Tensor | None, entering: Tensor,
    dv: Tensor | None, beta_sums: Tensor | None, scale: float, launch: Launch,
) -> None:  # fmt: skip
    batch, _, heads, value_size = do.shape
    key_size, itemsize = q.shape[-1], q.element_size()
    block = min(padded(value_size, itemsize), launch.block)
    value_gradient_kernel[(triton.cdiv(value_size, block), segments(q, do), batch * heads)](
        q, k, do, weights, through, inverse, scores, written, leaving, entering, dv, beta_sums,
        *_sizes(q, do), _segment(q, do), scale, *strides(q), *strides(k), *strides(do),
        C=inverse.shape[-1], K=key_size, V=value_size, BK=padded(key_size, itemsize), BV=block,
        DECAY=through.shape[-1] > 0, SUMMARIZE=dv is None, STAGES=launch.stages,
        PRECISION=precision(q), **_options(launch),
    )  # fmt: skip


@step("fla_dist::gated_delta_rule_summarize_gradient")
def summarize_gradient(
    q: Tensor, k: Tensor, do: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """What each segment's own outputs give the gradient of its entering state, [B, S, H, K, V]."""
    batch, _, heads, value_size = do.shape
    gradient = floats(do, batch, segments(q, do), heads, q.shape[-1], value_size)
    _value_gradient(
        q, k, do, weights, through, inverse, scores, None, None, gradient, None, None, scale,
        _settings(q, do).summarize_gradient,
    )  # fmt: skip
    return gradient


@summarize_gradient.register_fake
def _(q, k, do, weights, through, inverse, scores, scale):
    batch, _, heads, value_size = do.shape
    return floats(do, batch, segments(q, do), heads, q.shape[-1], value_size)


@step("fla_dist::gated_delta_rule_value_gradient")
def value_gradient(
    q: Tensor, k: Tensor, do: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor, written: Tensor, leaving_gradient: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dv, dβ [B, T, H] fp32, and the gradient of the state that enters the first segment, from the
    gradients of those that leave the segments."""
    batch, length, heads, value_size = do.shape
    launch = _settings(q, do).value_gradient
    blocks = triton.cdiv(value_size, min(padded(value_size, q.element_size()), launch.block))
    dv, beta_sums = torch.empty_like(written), floats(q, blocks, batch, heads, length)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    _value_gradient(
        q, k, do, weights, through, inverse, scores, written, leaving_gradient, initial_gradient,
        dv, beta_sums, scale, launch,
    )  # fmt: skip
    return dv, beta_sums.sum(0).transpose(1, 2), initial_gradient


@value_gradient.register_fake
def _(q, k, do, weights, through, inverse, scores, written, leaving_gradient, scale):
    batch, length, heads, _ = do.shape
    dbeta = floats(q, batch, heads, length).transpose(1, 2)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    return torch.empty_like(written), dbeta, initial_gradient


@step("fla_dist::gated_delta_rule_key_gradient")
def key_gradient(
    q: Tensor, k: Tensor, do: Tensor, dv: Tensor, written: Tensor, weights: Tensor,
    through: Tensor, doc_ids: Tensor | None, entering: Tensor, final: Tensor,
    leaving_gradient: Tensor, scale: float, with_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq and dk of each value head [B, T, H, K], and dg [B, T, H] fp32 (empty unless `with_gates`),
    from the states that enter the segments and the gradients of those that leave them."""
    batch, length, heads, value_size = do.shape
    key_size, itemsize, chosen = q.shape[-1], q.element_size(), _settings(q, do)
    count, rows = triton.cdiv(length, chosen.chunk), batch * heads
    packed, decay = doc_ids is not None, through.shape[-1] > 0
    where = (*strides(q), *strides(k), *strides(do))
    common = {"C": chosen.chunk, "K": key_size, "V": value_size, "PRECISION": precision(q)}

    query_pairs, key_pairs = (q.new_empty(batch, heads, length, chosen.chunk) for _ in range(2))
    pair_sums = floats(q, batch, heads, length if with_gates else 0)
    pair_gradient_kernel[(count, 1, rows)](
        q, k, do, dv, written, weights, doc_ids, query_pairs, key_pairs, pair_sums,
        *_sizes(q, do), scale, *where,
        BK=min(padded(key_size, itemsize), chosen.pairs.block),
        BV=min(padded(value_size, itemsize), chosen.pairs.block),
        DECAY=decay, PACKED=packed, SUMS=with_gates, **common, **_options(chosen.pairs),
    )  # fmt: skip

    launch = chosen.key_gradient
    block = min(padded(key_size, itemsize), launch.block)
    blocks = triton.cdiv(key_size, block)
    dq, dk = (q.new_empty(batch, length, heads, key_size) for _ in range(2))
    sums_blocks = blocks if with_gates else 0
    state_sums, after_sums = (floats(q, sums_blocks, batch, heads, length) for _ in range(2))
    across_sums = floats(q, sums_blocks, batch, heads, count)
    grid = (blocks, entering.shape[1], rows)
    sizes = (*_sizes(q, do), _segment(q, do), scale)
    options = {
        "BK": block, "BV": padded(value_size, itemsize), "DECAY": decay, "SUMS": with_gates,
        "STAGES": launch.stages, **common, **_options(launch),
    }  # fmt: skip
    query_gradient_kernel[grid](
        q, k, do, dv, written, weights, through, query_pairs, entering, dq, dk, state_sums,
        *sizes, *where, **options,
    )  # fmt: skip
    key_gradient_kernel[grid](
        q, k, do, dv, written, weights, through, query_pairs, key_pairs, entering, final,
        leaving_gradient, state_sums, dk, after_sums, across_sums,
        *sizes, *where, EXACT=precision(q) == "ieee", **options,
    )  # fmt: skip
    if not with_gates:
        return dq, dk, floats(q, 0)
    dg = floats(q, batch, length, heads)
    decay_gradient_kernel[(count, 1, rows)](
        pair_sums, state_sums, after_sums, across_sums, doc_ids, dg, length, heads, blocks,
        C=chosen.chunk, PACKED=packed, num_warps=2,
    )  # fmt: skip
    return dq, dk, dg


@key_gradient.register_fake
def _(
    q, k, do, dv, written, weights, through, doc_ids, entering, final, leaving_gradient, scale,
    with_gates,
):  # fmt: skip
    batch, length, heads, _ = do.shape
    dq, dk = (q.new_empty(batch, length, heads, q.shape[-1]) for _ in range(2))
    return dq, dk, floats(q, *((batch, length, heads) if with_gates else (0,)))
