"""The steps of simple GLA as torch.library ops: tensors in, tensors out, one to a launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import Launch, padded, precision, step, strides
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.simple_gla.settings import Settings, settings
from fla_dist.kernels.simple_gla.triton_kernels import (
    HEAD_DECAY,
    NO_DECAY,
    TOKEN_DECAY,
    decay_gradient_kernel,
    output_kernel,
    summarize_kernel,
)
from fla_dist.kernels.state import RESET


def _settings(q: Tensor, v: Tensor) -> tuple[Settings, int]:
    """The launch settings, and the tokens of a segment."""
    batch, length, heads, key_size = q.shape
    chosen = settings(launches.capability(q), key_size, v.shape[-1], q.element_size())
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


@step("fla_dist::simple_gla_summarize")
def summarize(
    y: Tensor, z: Tensor, g: Tensor | None, doc_ids: Tensor | None, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, X, Z], and its log decay, [B, S, H, 1, 1]
    (left unwritten in reverse)."""
    batch, length, heads, size_x = y.shape
    size_z, itemsize = z.shape[-1], z.element_size()
    chosen, segment = _settings(y, z)
    count = -(-length // segment)
    state = torch.empty(batch, count, heads, size_x, size_z, dtype=torch.float32, device=y.device)
    log_decay = torch.empty(batch, count, heads, 1, 1, dtype=torch.float32, device=y.device)
    launch = chosen.summarize
    block_x, block_z = (
        min(padded(size_x, itemsize), 128),
        min(padded(size_z, itemsize), launch.block),
    )
    kind, decay_strides = _decay(g)
    blocks = triton.cdiv(size_x, block_x) * triton.cdiv(size_z, block_z)
    summarize_kernel[(blocks, count, batch * heads)](
        y, z, g, doc_ids, state, log_decay,
        length, heads, size_x, size_z, segment, scale, *strides(y), *strides(z), *decay_strides,
        RESET=RESET, C=chosen.chunk, BX=block_x, BZ=block_z, DECAY=kind, PACKED=doc_ids is not None,
        REVERSE=reverse, PRECISION=precision(y), **launch.options(),
    )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(y, z, g, doc_ids, scale, reverse):
    batch, _, heads, size_x = y.shape
    shape = (batch, _segments(y, z), heads)
    return (
        y.new_empty(*shape, size_x, z.shape[-1], dtype=torch.float32),
        y.new_empty(*shape, 1, 1, dtype=torch.float32),
    )


def _walk(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    g: Tensor | None,
    doc_ids: Tensor | None,
    state: Tensor,
    own: Tensor | None,
    scale: float,
    *,
    transposed: bool,
    reverse: bool,
    chosen: Settings,
    segment: int,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch of `output_kernel`; `transposed` where `state` is [.., Z, X]."""
    batch, length, heads, size_x = x.shape
    size_z, itemsize = z.shape[-1], z.element_size()
    out = torch.empty(batch, length, heads, size_z, dtype=z.dtype, device=z.device)
    block_z = min(padded(size_z, itemsize), launch.block)
    blocks = triton.cdiv(size_z, block_z)
    pair_sums, state_sums = _sums(x, blocks, own is not None)
    kind, decay_strides = _decay(g)
    output_kernel[(blocks, state.shape[1], batch * heads)](
        x, y, z, own, g, doc_ids, state, out, pair_sums, state_sums,
        length, heads, size_x, size_z, segment, scale, *strides(x), *strides(y), *strides(z),
        *((0, 0, 0) if own is None else strides(own)), *decay_strides,
        *((1, size_x) if transposed else (size_z, 1)),
        C=chosen.chunk, BX=padded(size_x, itemsize), BZ=block_z, DECAY=kind,
        PACKED=doc_ids is not None,
        REVERSE=reverse, SUMS=own is not None, PRECISION=precision(x),
        **launch.options(),
    )  # fmt: skip
    return out, pair_sums, state_sums


def _sums(x: Tensor, blocks: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """Room for `output_kernel`'s two sums, [blocks, B, H, T]."""
    batch, length, heads, _ = x.shape
    shape = (blocks if wanted else 0, batch, heads, length)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@step("fla_dist::simple_gla_output")
def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    doc_ids: Tensor | None,
    entering: Tensor,
    scale: float,
) -> Tensor:
    """o [B, T, H, V] from the states that enter the segments."""
    chosen, segment = _settings(q, v)
    return _walk(
        q, k, v, g, doc_ids, entering, None, scale,
        transposed=False, reverse=False, chosen=chosen, segment=segment, launch=chosen.output,
    )[0]  # fmt: skip


@output.register_fake
def _(q, k, v, g, doc_ids, entering, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@step("fla_dist::simple_gla_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    g: Tensor | None,
    doc_ids: Tensor | None,
    entering: Tensor,
    final: Tensor,
    leaving_gradient: Tensor,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and dg [B, T, H] fp32 (empty unless `with_decay`), from the states that enter
    the segments and the gradients of those that leave them."""
    chosen, segment = _settings(q, v)
    batch, length, heads, key_size = q.shape
    value_size = v.shape[-1]
    dq, *query_sums = _walk(
        do, v, k, g, doc_ids, entering, q if with_decay else None, scale,
        transposed=True, reverse=False, chosen=chosen, segment=segment, launch=chosen.key_gradient,
    )  # fmt: skip
    dk, *key_sums = _walk(
        v, do, q, g, doc_ids, leaving_gradient, k if with_decay else None, scale,
        transposed=True, reverse=True, chosen=chosen, segment=segment, launch=chosen.key_gradient,
    )  # fmt: skip
    dv, _, _ = _walk(
        k, q, do, g, doc_ids, leaving_gradient, None, scale,
        transposed=False, reverse=True, chosen=chosen, segment=segment, launch=chosen.output,
    )  # fmt: skip
    if not with_decay:
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32)
    dg = torch.empty(batch, length, heads, dtype=torch.float32, device=q.device)
    kind, decay_strides = _decay(g)
    decay_gradient_kernel[(entering.shape[1], batch * heads)](
        query_sums[1], *key_sums, g, doc_ids, entering, final, leaving_gradient, dg,
        length, heads, key_size * value_size, segment, query_sums[1].shape[0],
        key_sums[0].shape[0], *decay_strides,
        C=chosen.chunk, BLOCK=2048, DECAY=kind, PACKED=doc_ids is not None,
        EXACT=precision(q) == "ieee", num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dg


@backward.register_fake
def _(q, k, v, do, g, doc_ids, entering, final, leaving_gradient, scale, with_decay):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shape = q.shape[:3] if with_decay else (0,)
    return dq, dk, dv, q.new_empty(shape, dtype=torch.float32)
