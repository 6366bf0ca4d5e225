"""The steps of Mamba-2 as torch.library ops: tensors in, tensors out.

q (the paper's C), k (its B): [B, T, Q, N], each of Q groups serving H / Q heads of v.  v (its x):
[B, T, H, P].  g, log decay, and step, Δ: [B, T, H] fp32.  skip (its D): [H] fp32 or None.
numbers: of tokens, [4, B, H, L] fp32, the steps, from_start, to_end and outgoing of
fla_dist.kernels.mamba2.triton_kernels.  States of chunks: [B, chunks, H, N, P] and
their scales [B, H, chunks] fp32, in fp16, or for fp32 inputs in fp32 and of no use.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common import launch as launches
from fla_dist.kernels.common.launch import padded, precision, step, strides
from fla_dist.kernels.common.segments import segment_length
from fla_dist.kernels.mamba2.settings import Settings, settings
from fla_dist.kernels.mamba2.triton_kernels import (
    decay_gradient_kernel,
    output_kernel,
    prepare_kernel,
    shared_gradient_kernel,
    value_gradient_kernel,
    walk_kernel,
)
from fla_dist.kernels.state import RESET


def plan(q: Tensor, v: Tensor) -> tuple[Settings, int, int]:
    """The launch settings, the chunks of a segment, and all chunks."""
    batch, length, heads, width = v.shape
    chosen = settings(launches.capability(q), q.shape[-1], width, q.element_size())
    segment = segment_length(
        batch, length, heads, chosen.chunk, chosen.programs * chosen.heads, chosen.longest
    )
    return chosen, segment // chosen.chunk, -(-length // chosen.chunk)


_padded = lru_cache(padded)


@lru_cache
def _blocks(size: int, itemsize: int, widest: int) -> tuple[int, int]:
    """The width of blocks that an axis is divided into, and their number."""
    width = min(_padded(size, itemsize), widest)
    return width, -(-size // width)


@lru_cache
def _together(sharing: int, chunks: int, least: int) -> int:
    """The heads of a group which a program takes: as many as leave `least` programs, where there
    are `chunks` programs of all of them."""
    divisors = [n for n in range(1, sharing + 1) if sharing % n == 0]
    return max((n for n in divisors if chunks * (sharing // n) >= least), default=1)


@step("fla_dist::mamba2_prepare")
def prepare(
    q: Tensor, v: Tensor, g: Tensor, step: Tensor, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The running sums of g, `numbers`, and the chunks' log2 decays."""
    batch, length, heads, _ = v.shape
    sums, numbers, chunk_log = _numbers(q, v)
    chosen, _, chunks = plan(q, v)
    block = 16
    prepare_kernel[(chunks, -(-heads // block), batch)](
        g, step, doc_ids, sums, *numbers.unbind(0), chunk_log,
        length, heads, *strides(g), *strides(step),
        RESET=RESET, C=chosen.chunk, BH=block, PACKED=doc_ids is not None, num_warps=4,
    )  # fmt: skip
    return sums, numbers, chunk_log


def _numbers(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where decays are strong, differences of fp32 sums are not exact to fp32."""
    batch, _, heads, _ = v.shape
    chosen, _, chunks = plan(q, v)
    exact = torch.float64 if q.dtype == torch.float32 else torch.float32
    tokens = chunks * chosen.chunk
    return (
        v.new_empty(batch, heads, tokens, dtype=exact),
        launches.floats(v, 4, batch, heads, tokens),
        launches.floats(v, batch, heads, chunks),
    )


@prepare.register_fake
def _(q, v, g, step, doc_ids):
    return _numbers(q, v)


_WALKED = 2**15
"""Numbers of states that a program walks with, at most."""


def _walk(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    chunk_log: Tensor,
    entering: Tensor | None,
    other: Tensor | None,
    other_scales: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch of `walk_kernel`: its states and their scales, and the log decays or what goes
    across chunks."""
    batch, length, heads, size_z = z.shape
    size_x, itemsize = y.shape[-1], z.element_size()
    chosen, segment, chunks = plan(y, z)
    launch = chosen.walk if entering is None else chosen.borders
    sharing = heads // y.shape[2]
    block_x, blocks_x = _blocks(size_x, itemsize, 256)
    block_z, blocks_z = _blocks(size_z, itemsize, launch.block)
    scaled = precision(y) != "ieee"
    assert not scaled or blocks_x * blocks_z == 1
    together = 1
    while (
        2 * together <= chosen.heads
        and sharing % (2 * together) == 0
        and blocks_z == 1
        and 2 * together * block_x * block_z <= _WALKED
    ):
        together *= 2
    count = -(-chunks // segment)
    if entering is None:
        states = scales = _segment_states(y, z)
        small = launches.floats(z, batch, count, heads, 1, 1)
    else:
        states, scales = _chunk_states(y, z)
        small = launches.floats(
            z, 0 if other is None else blocks_x * blocks_z, batch, heads, chunks
        )
    walk_kernel[(blocks_x * blocks_z, count, batch * heads // together)](
        y, z, weight, chunk_log, entering, states, scales, other, other_scales, small, small,
        length, heads, sharing, chunks, segment, *strides(y), *strides(z),
        X=size_x, Z=size_z, C=chosen.chunk, BX=block_x, BZ=block_z, HEADS=together,
        SCALED=scaled, BORDERS=entering is not None, ACROSS=other is not None,
        REVERSE=reverse, PRECISION=precision(y), **launch.options(),
    )  # fmt: skip
    return states, scales, small


def _segment_states(y: Tensor, z: Tensor) -> Tensor:
    chosen, segment, chunks = plan(y, z)
    return launches.floats(
        z, z.shape[0], -(-chunks // segment), z.shape[2], y.shape[-1], z.shape[-1]
    )


def _chunk_states(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = z.shape
    chunks = plan(y, z)[2]
    kept = torch.float32 if z.dtype == torch.float32 else torch.float16
    return (
        z.new_empty(batch, chunks, heads, y.shape[-1], width, dtype=kept),
        launches.floats(z, batch, heads, chunks),
    )


@step("fla_dist::mamba2_summarize")
def summarize(k: Tensor, v: Tensor, numbers: Tensor, chunk_log: Tensor) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, H, N, P], and its log decay, [B, S, H, 1, 1]."""
    state, _, log_decay = _walk(k, v, numbers[3], chunk_log, None, None, None, False)
    return state, log_decay


@summarize.register_fake
def _(k, v, numbers, chunk_log):
    state = _segment_states(k, v)
    return state, launches.floats(v, *state.shape[:3], 1, 1)


@step("fla_dist::mamba2_summarize_gradient")
def summarize_gradient(q: Tensor, do: Tensor, numbers: Tensor, chunk_log: Tensor) -> Tensor:
    """The gradient that each segment's own tokens give its entering state."""
    return _walk(q, do, numbers[1], chunk_log, None, None, None, True)[0]


@summarize_gradient.register_fake
def _(q, do, numbers, chunk_log):
    return _segment_states(q, do)


@step("fla_dist::mamba2_chunk_states")
def chunk_states(
    k: Tensor, v: Tensor, numbers: Tensor, chunk_log: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """The states that enter chunks from those that enter segments."""
    return _walk(k, v, numbers[3], chunk_log, entering, None, None, False)[:2]


@chunk_states.register_fake
def _(k, v, numbers, chunk_log, entering):
    return _chunk_states(k, v)


@step("fla_dist::mamba2_state_gradients")
def chunk_state_gradients(
    q: Tensor,
    do: Tensor,
    numbers: Tensor,
    chunk_log: Tensor,
    leaving: Tensor,
    states: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the states that leave chunks, and what goes across chunks,
    [blocks, B, H, chunks]."""
    return _walk(q, do, numbers[1], chunk_log, leaving, states, scales, True)


@chunk_state_gradients.register_fake
def _(q, do, numbers, chunk_log, leaving, states, scales):
    chosen, _, chunks = plan(q, do)
    blocks = _blocks(q.shape[-1], q.element_size(), 256)[1]
    blocks *= _blocks(do.shape[-1], q.element_size(), chosen.borders.block)[1]
    return *_chunk_states(q, do), launches.floats(q, blocks, do.shape[0], do.shape[2], chunks)


@step("fla_dist::mamba2_output")
def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    numbers: Tensor,
    skip: Tensor | None,
    doc_ids: Tensor | None,
    states: Tensor,
    scales: Tensor,
) -> Tensor:
    """o [B, T, H, P] from the states that enter chunks."""
    batch, length, heads, width = v.shape
    groups, size = q.shape[2:]
    chosen, _, chunks = plan(q, v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_v, slices = _blocks(width, v.element_size(), chosen.output.block)
    together = _together(heads // groups, batch * chunks * groups, chosen.together[0])
    output_kernel[(chunks * (heads // together), batch)](
        q, k, v, sums, numbers[0], numbers[1], skip, doc_ids, states, scales, out,
        length, heads, heads // groups, chunks, *strides(q), *strides(k), *strides(v),
        K=size, V=width, C=chosen.chunk, BK=_padded(size, v.element_size()), BV=block_v,
        HEADS=together, SLICES=slices, SCALED=precision(q) != "ieee", SKIP=skip is not None,
        PACKED=doc_ids is not None, PRECISION=precision(q), **chosen.output.options(),
    )  # fmt: skip
    return out


@output.register_fake
def _(q, k, v, sums, numbers, skip, doc_ids, states, scales):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@step("fla_dist::mamba2_gradient")
def gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    sums: Tensor,
    numbers: Tensor,
    skip: Tensor | None,
    doc_ids: Tensor | None,
    states: Tensor,
    scales: Tensor,
    gradients: Tensor,
    gradient_scales: Tensor,
    across: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and in fp32 dg [B, T, H], dstep [B, T, H] and dskip [H], empty where there is
    none; from the states that enter chunks and the gradients of those that leave them."""
    batch, length, heads, width = v.shape
    shared, size = q.shape[2:]
    itemsize, device = v.element_size(), v.device
    chosen, _, chunks = plan(q, v)
    chunk = chosen.chunk
    block_v, slices = _blocks(
        width, itemsize, min(chosen.value_gradient.block, chosen.shared_gradient.block)
    )
    together = _together(heads // shared, batch * chunks * shared, chosen.together[1])
    groups = heads // together
    dq, dk = (
        torch.empty(batch, length, groups, size, dtype=q.dtype, device=device) for _ in range(2)
    )
    dv = torch.empty(v.shape, dtype=v.dtype, device=device)
    seen, later, earlier, after, dstep = (
        launches.floats(v, slices, batch, heads, chunks * chunk) for _ in range(5)
    )
    dskip = launches.floats(v, 0 if skip is None else slices, batch, heads, chunks * chunk)
    pairs = q.new_empty(batch, groups, chunks, chunk, chunk)
    constants: dict[str, Any] = {
        "K": size, "V": width, "C": chunk, "BK": _padded(size, itemsize), "BV": block_v,
        "HEADS": together, "SLICES": slices, "SCALED": precision(q) != "ieee",
        "PRECISION": precision(q),
    }  # fmt: skip
    sizes = length, heads, heads // shared, chunks
    grid = (chunks * groups, batch)
    value_gradient_kernel[grid](
        q, k, v, do, sums, numbers[0], numbers[2], skip, doc_ids, gradients, gradient_scales, dv,
        dstep, dskip, later, earlier, after, pairs,
        *sizes, *strides(q), *strides(k), *strides(v), *strides(do),
        SKIP=skip is not None, PACKED=doc_ids is not None, **constants,
        **chosen.value_gradient.options(),
    )  # fmt: skip
    shared_gradient_kernel[grid](
        v, q, q, numbers[3], gradients, gradient_scales, pairs, dk, seen,
        *sizes, *strides(v), *strides(q), *strides(q), SEEN=False, **constants,
        **chosen.shared_gradient.options(),
    )  # fmt: skip
    shared_gradient_kernel[grid](
        do, k, q, numbers[1], states, scales, pairs, dq, seen,
        *sizes, *strides(do), *strides(k), *strides(q), SEEN=True, **constants,
        **chosen.shared_gradient.options(),
    )  # fmt: skip
    if groups > shared:
        dq, dk = (x.view(batch, length, shared, -1, size).sum(3) for x in (dq, dk))
    dg = launches.floats(v, batch, heads, chunks * chunk)
    rows, block = batch * heads * chunks, 16
    decay_gradient_kernel[(-(-rows // block),)](
        seen, later, earlier, after, across, dg, rows, chunks,
        C=chunk, R=block, SLICES=slices, BLOCKS=across.shape[0], num_warps=4,
    )  # fmt: skip
    dstep = dstep[0] if slices == 1 else dstep.sum(0)
    dg, dstep = (x[:, :, :length].transpose(1, 2) for x in (dg, dstep))
    return dq, dk, dv, dg, dstep, dskip.sum((0, 1, 3)) if skip is not None else dskip.view(0)


@gradient.register_fake
def _(
    q, k, v, do, sums, numbers, skip, doc_ids, states, scales, gradients, gradient_scales, across
):
    length = v.shape[1]
    dg, dstep = (torch.empty_like(numbers[0])[:, :, :length].transpose(1, 2) for _ in range(2))
    return (
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)),
        dg, dstep, launches.floats(v, 0 if skip is None else v.shape[2]),
    )  # fmt: skip
