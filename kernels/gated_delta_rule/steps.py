"""The steps of the gated delta rule as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import Launch, floats, padded, precision, step, strides
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.gated_delta_rule.settings import Settings, settings
from fla_dist.kernels.gated_delta_rule.triton_kernels import (
    key_gradient_kernel,
    prepare_kernel,
    value_gradient_kernel,
    value_walk_kernel,
)
from fla_dist.kernels.simple_gla.triton_kernels import NO_DECAY, TOKEN_DECAY

VALUES = 64
"""Of V, that the key gradient's kernel takes at a time."""


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
    count, decay = -(-length // chosen.chunk), g is not None or doc_ids is not None
    inverse, scores = (q.new_empty(batch, heads, length, chosen.chunk) for _ in range(2))
    weights = floats(q, 5 if decay else 2, batch, heads, length)
    through = floats(q, batch, heads, count if decay else 0)
    prepare_kernel[(count, 1, batch * heads)](
        q, k, g, beta, doc_ids, inverse, scores, weights, through,
        *_sizes(q, v), scale,
        *strides(q), *strides(k), *((0, 0, 0) if g is None else g.stride()), *beta.stride(),
        C=chosen.chunk, K=key_size,
        BK=min(padded(key_size, q.element_size()), chosen.prepare.block), DECAY=decay,
        GATES=(NO_DECAY if g is None else TOKEN_DECAY).value, PACKED=doc_ids is not None,
        PRECISION=precision(q), **chosen.prepare.options(),
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
    o: Tensor | None, written: Tensor | None, states: Tensor | None, scale: float, launch: Launch,
) -> None:  # fmt: skip
    batch, _, heads, value_size = v.shape
    key_size, itemsize = q.shape[-1], q.element_size()
    block = min(padded(value_size, itemsize), launch.block)
    blocks = -(-value_size // block)
    if transition is not None:
        blocks += -(-key_size // block)
    value_walk_kernel[(blocks, segments(q, v), batch * heads)](
        q, k, v, weights, through, inverse, scores, entering, leaving, transition, o, written,
        states, *_sizes(q, v), _segment(q, v), scale, *strides(q), *strides(k), *strides(v),
        C=inverse.shape[-1], K=key_size, V=value_size, BK=padded(key_size, itemsize), BV=block,
        DECAY=through.shape[-1] > 0, SUMMARIZE=transition is not None,
        KEEP=states is not None, STAGES=launch.stages, PRECISION=precision(q), **launch.options(),
    )  # fmt: skip


@step("fla_dist::gated_delta_rule_summarize")
def summarize(
    k: Tensor, v: Tensor, weights: Tensor, through: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Each segment's state from zero [B, S, H, K, V], and its transition [B, S, H, K, K]."""
    shape = (v.shape[0], segments(k, v), v.shape[2], k.shape[-1])
    state, transition = floats(v, *shape, v.shape[-1]), floats(v, *shape, k.shape[-1])
    _value_walk(
        k, k, v, weights, through, inverse, None, None, state, transition, None, None,
        None, 1.0, _settings(k, v).summarize,
    )  # fmt: skip
    return state, transition


@summarize.register_fake
def _(k, v, weights, through, inverse):
    shape = (v.shape[0], segments(k, v), v.shape[2], k.shape[-1])
    return floats(v, *shape, v.shape[-1]), floats(v, *shape, k.shape[-1])


def _states(q: Tensor, v: Tensor) -> Tensor:
    """Room for a transposed state a chunk, [B, N, H, V, K]."""
    chunks = -(-v.shape[1] // _settings(q, v).chunk)
    return q.new_empty(v.shape[0], chunks, v.shape[2], v.shape[-1], q.shape[-1])


@step("fla_dist::gated_delta_rule_output")
def output(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor, entering: Tensor, scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, `written` [B, T, H, V] and the transposed states before the chunks [B, N, H, V, K], both
    empty unless `keep`, and the state after the last token, from the states that enter the
    segments."""
    o, final = v.new_empty(v.shape), entering.new_empty(entering[:, 0].shape)
    written = v.new_empty(v.shape if keep else 0)
    states = _states(q, v) if keep else None
    _value_walk(
        q, k, v, weights, through, inverse, scores, entering, final, None, o, written, states,
        scale, _settings(q, v).output,
    )  # fmt: skip
    return o, written, v.new_empty(0) if states is None else states, final


@output.register_fake
def _(q, k, v, weights, through, inverse, scores, entering, scale, keep):
    written = v.new_empty(v.shape if keep else 0)
    states = _states(q, v) if keep else v.new_empty(0)
    return v.new_empty(v.shape), written, states, entering.new_empty(entering[:, 0].shape)


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
    value_gradient_kernel[(-(-value_size // block), segments(q, do), batch * heads)](
        q, k, do, weights, through, inverse, scores, None, None, gradient, None, None, None,
        *_sizes(q, do), _segment(q, do), scale, *strides(q), *strides(k), *strides(do),
        BV=block, SUMMARIZE=True, **_common(q, do, through, launch),
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
    q: Tensor, k: Tensor, do: Tensor, written: Tensor, states: Tensor, weights: Tensor,
    through: Tensor, inverse: Tensor, scores: Tensor, doc_ids: Tensor | None,
    leaving_gradient: Tensor, scale: float, with_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq and dk of each value head [B, T, H, K], dv, dg (empty unless `with_gates`) and dβ
    [B, T, H] fp32, and the gradient of the state that enters the first segment, from the states
    before the chunks and the gradients of those that leave the segments."""
    batch, length, heads, value_size = do.shape
    key_size, itemsize, chosen = q.shape[-1], q.element_size(), _settings(q, do)
    rows, where = batch * heads, (*strides(q), *strides(k), *strides(do))
    value_block = min(padded(value_size, itemsize), chosen.value_gradient.block)
    value_blocks = -(-value_size // value_block)
    parts = value_blocks * value_block // 16
    dv, beta_sums = torch.empty_like(written), floats(q, parts, batch, heads, length)
    state_gradients = torch.empty_like(states)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    value_gradient_kernel[(value_blocks, segments(q, do), rows)](
        q, k, do, weights, through, inverse, scores, written, leaving_gradient, initial_gradient,
        dv, beta_sums, state_gradients, *_sizes(q, do), _segment(q, do), scale, *where,
        BV=value_block, SUMMARIZE=False, **_common(q, do, through, chosen.value_gradient),
    )  # fmt: skip

    launch = chosen.key_gradient
    key_block = min(padded(key_size, itemsize), launch.block)
    key_blocks = -(-key_size // key_block)
    dq, dk = (q.new_empty(batch, length, heads, key_size) for _ in range(2))
    dg = floats(q, *((key_blocks, batch, length, heads) if with_gates else (1, 0)))
    dbeta = floats(q, batch, length, heads)
    options = _common(q, do, through, launch)
    options |= {"BK": key_block, "BV": min(padded(value_size, itemsize), VALUES)}
    key_gradient_kernel[(states.shape[1] * key_blocks, 1, rows)](
        q, k, do, dv, written, weights, through, doc_ids, states, state_gradients, beta_sums,
        dq, dk, dg, dbeta, *_sizes(q, do), scale, parts, *where,
        PACKED=doc_ids is not None, SUMS=with_gates, **options,
    )  # fmt: skip
    return dq, dk, dv, dg[0] if key_blocks == 1 else dg.sum(0), dbeta, initial_gradient


@gradients.register_fake
def _(
    q, k, do, written, states, weights, through, inverse, scores, doc_ids, leaving_gradient, scale,
    with_gates,
):  # fmt: skip
    batch, length, heads, _ = do.shape
    dq, dk = (q.new_empty(batch, length, heads, q.shape[-1]) for _ in range(2))
    dg = floats(q, *((batch, length, heads) if with_gates else (0,)))
    dbeta = floats(q, batch, length, heads)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    return dq, dk, torch.empty_like(written), dg, dbeta, initial_gradient
