"""RWKV7's recurrence: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.common.launch import is_checked
from fla_dist.kernels.common.segments import one_segment
from fla_dist.kernels.common.validation import check, check_attention, check_rank
from fla_dist.kernels.rwkv7.reference import rwkv7_chunked
from fla_dist.kernels.rwkv7.settings import CHECKED, SHORTEST
from fla_dist.kernels.rwkv7.steps import (
    key_gradient,
    prepare,
    segments,
    summarize,
    summarize_gradient,
    walk,
)
from fla_dist.kernels.state import LOCAL, Dense, Scan


class SegmentedRWKV7(torch.autograd.Function):
    """Solve the chunks, summarize the segments, join them, walk them; the backward mirrors it. One
    segment that no other process continues is walked without a summary."""

    @staticmethod
    def forward(ctx: Any, r, g, k, v, a, b, initial_state, doc_ids, scale, scan):
        reads, writes, pairs, through = prepare(r, k, v, a, b, g, doc_ids, scale)
        pending = None
        if scan is LOCAL and segments(r, v) == 1:
            entering = one_segment(initial_state, r, v)
        else:
            state, transition = summarize(reads, writes, v, pairs, through)
            pending = on_gpu(scan).start(Dense(transition), state, initial_state)
            entering, _ = pending.wait()
        o, u, states, final = walk(reads, writes, v, pairs, through, entering, False)
        ctx.save_for_backward(
            r, g, k, v, a, b, doc_ids, reads, writes, pairs, through, u, states, final
        )
        ctx.pending, ctx.scan, ctx.scale = pending, scan, scale
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do, final_gradient):
        r, g, k, v, a, b, doc_ids, reads, writes, pairs, through, u, states, final = (
            ctx.saved_tensors
        )
        do = torch.zeros_like(v) if do is None else do.contiguous()
        initial_gradient = None
        if ctx.pending is None:
            leaving_gradient = one_segment(final_gradient, r, v)
        else:
            gradient = summarize_gradient(reads, writes, do, pairs, through)
            leaving_gradient, initial_gradient = (
                on_gpu(ctx.scan)
                .start(ctx.pending.transition, gradient, final_gradient, reverse_of=ctx.pending)
                .wait()
            )
        dv, du, gradients, first_gradient = walk(
            reads, writes, do, pairs, through, leaving_gradient, True
        )
        dr, dk, da, db, dg = key_gradient(
            r, k, v, a, b, g, do, u, du, doc_ids, reads, writes, pairs, through, states, final,
            gradients, ctx.scale,
        )  # fmt: skip
        if initial_gradient is None:
            initial_gradient = first_gradient
        return (
            dr, dg, dk, dv, da, db, initial_gradient if ctx.has_initial else None, None, None, None,
        )  # fmt: skip


def _has_kernels(r: Tensor, v: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the kernels serve these arguments; the reference serves the others."""
    checked = is_checked(r, r.shape[-1], v.shape[-1], CHECKED) and r.shape[1] >= SHORTEST
    return checked and a.dtype == b.dtype == r.dtype


def segmented_rwkv7(
    r: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """RWKV7's recurrence by the Triton kernels; its arguments are checked."""
    r, g, k, v, a, b = (x.contiguous() for x in (r, g, k, v, a, b))
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    return SegmentedRWKV7.apply(r, g, k, v, a, b, initial_state, doc_ids, scale, scan)


def rwkv7(
    r: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """RWKV7's recurrence, the generalized delta rule (arXiv:2503.14456), its state transposed.

        S_t = (diag(exp g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ r_t

    The paper's a_t is -κ̂ and its b_t is κ̂ ⊙ the in-context learning rate. The bonus of the current
    token is the mixer's.

    Args:
        r, k, a, b: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, K], natural log of the decay, at most 0.
        scale: 1 unless given.
        initial_state: [B, H, K, V] fp32, the state before the first token of the whole stream (of
            the first rank's slice).
        doc_ids: [B, T] int32, never falling along T; the state restarts where it rises, and 0 is
            the document that `initial_state` belongs to.
        scan: how stretches of the sequence are joined: LOCAL, or one made by fla_dist.parallel.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, K, V] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
            expected.
    """
    check_rank("rwkv7", "r", r, "B T H K")
    check_attention("rwkv7", r, k, v, initial_state, doc_ids)
    for name, x in (("g", g), ("a", a), ("b", b)):
        check("rwkv7", name, x, tuple(r.shape), r)
    scale = 1.0 if scale is None else scale
    if _has_kernels(r, v, a, b):
        return segmented_rwkv7(
            r, g, k, v, a, b,
            scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    o, final_state = rwkv7_chunked(
        r, g, k, v, a, b,
        scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
    )  # fmt: skip
    return o.to(v.dtype), final_state
