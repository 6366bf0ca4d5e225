"""The steps of KDA as torch.library ops: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import Launch, floats, padded, precision, step, strides
from fla_dist.kernels.common.levels import identity, span_types, spans
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.kda.settings import Settings, settings
from fla_dist.kernels.kda.triton_kernels import (
    key_walk_kernel,
    pair_gradient_kernel,
    prepare_kernel,
    query_walk_kernel,
    value_gradient_kernel,
    value_walk_kernel,
)


def _settings(k: Tensor, v: Tensor) -> Settings:
    return settings(launches.capability(k), k.shape[-1], v.shape[-1], k.element_size())


def _segment(k: Tensor, v: Tensor) -> int:
    """Tokens of a segment."""
    batch, length, heads, _ = v.shape
    chosen = _settings(k, v)
    return segment_length(batch, length, heads, chosen.chunk, chosen.programs, length)


def segments(k: Tensor, v: Tensor) -> int:
    return -(-v.shape[1] // _segment(k, v))


@step("fla_dist::kda_prepare")
def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q̂, -K̂, k̄ [B, H, T, K], the decays over the chunks [B, H, N, K], A and Y [B, H, T, C]; of v
    only the shape matters."""
    batch, length, heads, key_size = q.shape
    chosen = _settings(q, v)
    chunk, launch = chosen.chunk, chosen.prepare
    chunks = -(-length // chunk)
    q_in, k_in, k_out = (q.new_empty(batch, heads, length, key_size) for _ in range(3))
    scores, inverse = (q.new_empty(batch, heads, length, chunk) for _ in range(2))
    through = floats(q, batch, heads, chunks, key_size)
    prepare_kernel[(chunks * heads, batch)](
        q, k, g, beta, doc_ids, identity(chunk, span_types(q.dtype)[0], q.device),
        q_in, k_in, k_out, through, scores, inverse,
        length, heads, scale, *strides(q), *strides(k), *strides(g), *beta.stride(),
        C=chunk, LEVELS=chunk.bit_length() - 1, K=key_size,
        BK=min(padded(key_size, q.element_size()), launch.block), PACKED=doc_ids is not None,
        STAGES=launch.stages, PRECISION=precision(q), **launch.options(),
    )  # fmt: skip
    return q_in, k_in, k_out, through, scores, inverse


@prepare.register_fake
def _(q, k, v, g, beta, doc_ids, scale):
    batch, length, heads, key_size = q.shape
    chunk = _settings(q, v).chunk
    rows = (q.new_empty(batch, heads, length, key_size) for _ in range(3))
    pairs = (q.new_empty(batch, heads, length, chunk) for _ in range(2))
    return *rows, floats(q, batch, heads, -(-length // chunk), key_size), *pairs


def _value_walk(
    q_in: Tensor | None, k_in: Tensor, k_out: Tensor, v: Tensor, through: Tensor, inverse: Tensor,
    scores: Tensor | None, entering: Tensor | None, leaving: Tensor, transition: Tensor | None,
    o: Tensor | None, residual: Tensor | None, launch: Launch,
) -> None:  # fmt: skip
    batch, length, heads, value_size = v.shape
    key_size, itemsize = k_in.shape[-1], k_in.element_size()
    block = min(padded(value_size, itemsize), launch.block)
    blocks = -(-value_size // block)
    if transition is not None:
        blocks += -(-key_size // block)
    value_walk_kernel[(blocks, segments(k_in, v), batch * heads)](
        q_in, k_in, k_out, v, through, inverse, scores, entering, leaving, transition, o, residual,
        length, heads, _segment(k_in, v), *strides(v),
        C=inverse.shape[-1], K=key_size, V=value_size, BK=padded(key_size, itemsize), BV=block,
        SUMMARIZE=transition is not None, STAGES=launch.stages, PRECISION=precision(k_in),
        **launch.options(),
    )  # fmt: skip


@step("fla_dist::kda_summarize")
def summarize(
    k_in: Tensor, k_out: Tensor, v: Tensor, through: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Each segment's state from zero [B, S, H, K, V], and its transition [B, S, H, K, K]."""
    shape = (v.shape[0], segments(k_in, v), v.shape[2], k_in.shape[-1])
    state, transition = floats(v, *shape, v.shape[-1]), floats(v, *shape, k_in.shape[-1])
    _value_walk(
        None, k_in, k_out, v, through, inverse, None, None, state, transition, None, None,
        _settings(k_in, v).summarize,
    )  # fmt: skip
    return state, transition


@summarize.register_fake
def _(k_in, k_out, v, through, inverse):
    shape = (v.shape[0], segments(k_in, v), v.shape[2], k_in.shape[-1])
    return floats(v, *shape, v.shape[-1]), floats(v, *shape, k_in.shape[-1])


@step("fla_dist::kda_output")
def output(
    q_in: Tensor, k_in: Tensor, k_out: Tensor, v: Tensor, through: Tensor, scores: Tensor,
    inverse: Tensor, entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o and r [B, T, H, V], and the state after the last token, from the states that enter the
    segments."""
    o, residual = (v.new_empty(v.shape) for _ in range(2))
    final = entering.new_empty(entering[:, 0].shape)
    _value_walk(
        q_in, k_in, k_out, v, through, inverse, scores, entering, final, None, o, residual,
        _settings(k_in, v).output,
    )  # fmt: skip
    return o, residual, final


@output.register_fake
def _(q_in, k_in, k_out, v, through, scores, inverse, entering):
    return v.new_empty(v.shape), v.new_empty(v.shape), entering.new_empty(entering[:, 0].shape)


def _value_gradient(
    q_in: Tensor, k_in: Tensor, k_out: Tensor, do: Tensor, through: Tensor, scores: Tensor,
    inverse: Tensor, leaving: Tensor | None, entering: Tensor, dv: Tensor | None, launch: Launch,
) -> None:  # fmt: skip
    batch, length, heads, value_size = do.shape
    key_size, itemsize = k_in.shape[-1], k_in.element_size()
    block = min(padded(value_size, itemsize), launch.block)
    value_gradient_kernel[(-(-value_size // block), segments(k_in, do), batch * heads)](
        q_in, k_in, k_out, do, through, inverse, scores, leaving, entering, dv,
        length, heads, _segment(k_in, do), *strides(do),
        C=inverse.shape[-1], K=key_size, V=value_size, BK=padded(key_size, itemsize), BV=block,
        SUMMARIZE=dv is None, STAGES=launch.stages, PRECISION=precision(k_in), **launch.options(),
    )  # fmt: skip


@step("fla_dist::kda_summarize_gradient")
def summarize_gradient(
    q_in: Tensor, k_in: Tensor, k_out: Tensor, do: Tensor, through: Tensor, scores: Tensor,
    inverse: Tensor,
) -> Tensor:  # fmt: skip
    """What each segment's own outputs give the gradient of its entering state, [B, S, H, K, V]."""
    batch, _, heads, value_size = do.shape
    gradient = floats(do, batch, segments(k_in, do), heads, k_in.shape[-1], value_size)
    _value_gradient(
        q_in, k_in, k_out, do, through, scores, inverse, None, gradient, None,
        _settings(k_in, do).summarize_gradient,
    )  # fmt: skip
    return gradient


@summarize_gradient.register_fake
def _(q_in, k_in, k_out, do, through, scores, inverse):
    batch, _, heads, value_size = do.shape
    return floats(do, batch, segments(k_in, do), heads, k_in.shape[-1], value_size)


@step("fla_dist::kda_value_gradient")
def value_gradient(
    q_in: Tensor, k_in: Tensor, k_out: Tensor, do: Tensor, through: Tensor, scores: Tensor,
    inverse: Tensor, leaving_gradient: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dv, and the gradient of the state that enters the first segment, from the gradients of those
    that leave the segments."""
    dv = do.new_empty(do.shape)
    initial_gradient = leaving_gradient.new_empty(leaving_gradient[:, 0].shape)
    _value_gradient(
        q_in, k_in, k_out, do, through, scores, inverse, leaving_gradient, initial_gradient, dv,
        _settings(k_in, do).value_gradient,
    )  # fmt: skip
    return dv, initial_gradient


@value_gradient.register_fake
def _(q_in, k_in, k_out, do, through, scores, inverse, leaving_gradient):
    return do.new_empty(do.shape), leaving_gradient.new_empty(leaving_gradient[:, 0].shape)


@step("fla_dist::kda_key_gradient")
def key_gradient(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, doc_ids: Tensor | None, q_in: Tensor,
    k_in: Tensor, k_out: Tensor, through: Tensor, residual: Tensor, do: Tensor, dv: Tensor,
    entering: Tensor, final: Tensor, leaving_gradient: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dg [B, T, H, K], and dbeta [B, T, H] fp32, from the states that enter the segments
    and the gradients of those that leave them."""
    batch, length, heads, key_size = q.shape
    value_size, itemsize, chosen = do.shape[-1], q.element_size(), _settings(q, do)
    chunk, chunks = chosen.chunk, through.shape[2]
    common = {"C": chunk, "K": key_size, "V": value_size, "PRECISION": precision(q)}
    dq_in, dk_in, dk_out = (q.new_empty(batch, heads, chunks, key_size, chunk) for _ in range(3))
    chunk_sums, across = torch.empty_like(through), torch.empty_like(through)
    prepared, given = (q_in, k_in, k_out), (do, dv, residual)
    sizes = (length, heads, _segment(q, do), *strides(do))
    for kernel, launch, arguments in (
        (query_walk_kernel, chosen.query_walk, (entering, dq_in, dk_in, chunk_sums)),
        (
            key_walk_kernel, chosen.key_walk,
            (entering, final, leaving_gradient, chunk_sums, dk_out, across),
        ),
    ):  # fmt: skip
        block = min(padded(key_size, itemsize), launch.block)
        kernel[(-(-key_size // block), entering.shape[1], batch * heads)](
            *prepared, *given, through, *arguments, *sizes,
            BK=block, BV=padded(value_size, itemsize), STAGES=launch.stages, **common,
            **launch.options(),
        )  # fmt: skip
    dq, dk, dg = q.new_empty(q.shape), k.new_empty(k.shape), g.new_empty(g.shape)
    dbeta = floats(q, batch, length, heads)
    launch = chosen.pairs
    summed, summed_gradient = span_types(q.dtype)
    pair_gradient_kernel[(chunks * heads, batch)](
        q, k, g, beta, *given, doc_ids,
        identity(chunk, summed, q.device), spans(chunk, summed_gradient, q.device),
        dq_in, dk_in, dk_out, across, dq, dk, dg, dbeta, length, heads, scale,
        *strides(q), *strides(k), *strides(g), *beta.stride(), *strides(do),
        LEVELS=chunk.bit_length() - 1, BK=min(padded(key_size, itemsize), launch.block),
        BV=min(padded(value_size, itemsize), launch.block), PACKED=doc_ids is not None,
        PARTS=2 if q.dtype == torch.float16 else 1, STAGES=launch.stages, **common,
        **launch.options(),
    )  # fmt: skip
    return dq, dk, dg, dbeta


@key_gradient.register_fake
def _(
    q, k, g, beta, doc_ids, q_in, k_in, k_out, through, residual, do, dv, entering, final,
    leaving_gradient, scale,
):  # fmt: skip
    dbeta = floats(q, *q.shape[:3])
    return q.new_empty(q.shape), k.new_empty(k.shape), g.new_empty(g.shape), dbeta
