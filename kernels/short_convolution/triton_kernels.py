"""The short convolution in Triton, forward and backward.

Notation: B batch, T tokens, D channels, W taps, S segments, U tokens of a step. x, y and their
gradients are [B, T, D]; left, the tokens before x, is [B, W-1, D]; weight is [D, W]. `b_*` are
blocks in registers, [BD], one for each token.

A token's row is read with its W-1 predecessors', which the cache holds: each kernel moves every
number through memory once. Both should be bound by that.
"""

# Tuples of blocks grow while their loops are unrolled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel

CHANNELS, STEP, BACKWARD_STEP, SEGMENT, WARPS = 256, 8, 4, 256, 4
"""Channels of a program, tokens of a step, tokens of a segment of the backward. (A longer step of
the backward takes 10 s to compile.)"""


@triton.jit
def where(mask_d, inside):
    """The channels' mask at one token. (With a comparison of numbers it is an integer in the
    interpreter of Triton 3.9.)"""
    return (mask_d & inside) != 0


@triton.jit
def load_row(x, left, t, T, o_d, mask_d, x_stride_t, D, W: tl.constexpr, INNER: tl.constexpr):
    """Token t of left and x one after the other, t from 1 - W; zeros beyond. INNER: t is in x."""
    if INNER:
        b_x = tl.load(x + t * x_stride_t + o_d, mask=mask_d, other=0.0).to(tl.float32)
    else:
        inside = (t >= 0) & (t < T)
        b_x = tl.load(x + t * x_stride_t + o_d, mask=where(mask_d, inside), other=0.0)
        b_x = b_x.to(tl.float32)
        if W > 1:
            before = (t < 0) & (t > -W)
            b_left = tl.load(left + (t + W - 1) * D + o_d, mask=where(mask_d, before), other=0.0)
            b_x += b_left.to(tl.float32)
    return b_x


@triton.jit
def all_inner(positions, start, T, W: tl.constexpr, U: tl.constexpr, AFTER: tl.constexpr):
    """Whether tokens start - (W - 1) to start + U + AFTER are in x, and from start on none sees
    less than W tokens."""
    o_t = tl.arange(0, 16)
    tl.static_assert(U + AFTER <= 16)
    beyond = (o_t >= U + AFTER) | (start + o_t >= T)
    b_position = tl.load(positions + start + o_t, mask=((start >= 0) & ~beyond) != 0, other=W)
    inside = (start >= W - 1) & (start + U + AFTER <= T)
    return inside & (tl.min(b_position, axis=0) >= W - 1)


@triton.jit
def tap_product(b_tap, b_row, position, j: tl.constexpr, INNER: tl.constexpr):
    """b_tap b_row where the token at `position` sees the j-th before it."""
    if INNER:
        return b_tap * b_row
    else:
        return tl.where(position >= j, b_tap * b_row, 0.0)


@triton.jit
def load_position(positions, t, T, INNER: tl.constexpr):
    if INNER:
        return 0
    else:
        return tl.load(positions + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def load_taps(weight, o_d, mask_d, W: tl.constexpr):
    """The weights by distance: that of the token itself first."""
    b_taps = ()
    for j in tl.static_range(W):
        b_taps += (tl.load(weight + o_d * W + W - 1 - j, mask=mask_d, other=0.0).to(tl.float32),)
    return b_taps


@triton.jit
def load_bias(bias, o_d, mask_d, BIAS: tl.constexpr):
    b_bias = tl.zeros(o_d.shape, dtype=tl.float32)
    if BIAS:
        b_bias += tl.load(bias + o_d, mask=mask_d, other=0.0).to(tl.float32)
    return b_bias


@triton.jit
def sum_at(b_rows, b_taps, b_bias, position, i: tl.constexpr, W: tl.constexpr, INNER: tl.constexpr):
    """The sum of the token whose row is b_rows[i + W - 1]."""
    b_sum = b_bias + b_taps[0] * b_rows[i + W - 1]
    for j in tl.static_range(1, W):
        b_sum += tap_product(b_taps[j], b_rows[i + W - 1 - j], position, j, INNER)
    return b_sum


@triton.jit
def forward_step(
    x, left, positions, y, b_taps, b_bias, start, T, o_d, mask_d, x_stride_t, D,
    W: tl.constexpr, U: tl.constexpr, SILU: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    b_rows = ()
    for i in tl.static_range(U + W - 1):
        b_rows += (load_row(x, left, start + i - (W - 1), T, o_d, mask_d, x_stride_t, D, W, INNER),)
    for i in tl.static_range(U):
        t = start + i
        b_y = sum_at(b_rows, b_taps, b_bias, load_position(positions, t, T, INNER), i, W, INNER)
        if SILU:
            b_y *= tl.sigmoid(b_y)
        tl.store(y + t * D + o_d, b_y.to(y.dtype.element_ty), mask=where(mask_d, t < T))


@Kernel
@triton.jit
def short_convolution_kernel(
    x, weight, bias, left, positions, y,
    T, x_stride_b, x_stride_t, D,
    W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """y of U tokens and BD channels. Grid: (blocks of D, steps, B). Reads x, writes y: 4 bytes a
    number in bf16."""
    i_b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * U
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d = o_d < D
    x += i_b * x_stride_b
    left += i_b * (W - 1) * D
    positions += i_b * T
    y += i_b * T * D
    b_taps = load_taps(weight, o_d, mask_d, W)
    b_bias = load_bias(bias, o_d, mask_d, BIAS)
    if all_inner(positions, start, T, W, U, 0):
        forward_step(
            x, left, positions, y, b_taps, b_bias, start, T, o_d, mask_d, x_stride_t, D, W, U, SILU,
            True,
        )  # fmt: skip
    else:
        forward_step(
            x, left, positions, y, b_taps, b_bias, start, T, o_d, mask_d, x_stride_t, D, W, U, SILU,
            False,
        )  # fmt: skip


@triton.jit
def sum_gradient(
    dy, b_rows, b_taps, b_bias, positions, t, T, o_d, mask_d, dy_stride_t, i: tl.constexpr,
    W: tl.constexpr, SILU: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """p_t, the gradient of token t's sum; its own row is b_rows[i + W - 1]."""
    mask = mask_d
    if not INNER:
        mask = where(mask_d, (t >= 0) & (t < T))
    b_p = tl.load(dy + t * dy_stride_t + o_d, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        b_sum = sum_at(b_rows, b_taps, b_bias, load_position(positions, t, T, INNER), i, W, INNER)
        b_open = tl.sigmoid(b_sum)
        b_p *= b_open * (1.0 + b_sum * (1.0 - b_open))
    return b_p


@triton.jit
def backward_step(
    x, left, positions, dy, dx, dleft, b_taps, b_bias, b_state, start, end, T, o_d, mask_d,
    x_stride_t, dy_stride_t, D,
    W: tl.constexpr, U: tl.constexpr, SILU: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dx of U tokens. The state: x of the W - 1 tokens before those after the step, p of those
    after it, the sums of the taps' and the bias' gradients."""
    b_later_rows, b_later_ps, b_dtaps, b_dbias = b_state
    b_rows, b_ps = (), ()
    for i in tl.static_range(U):
        b_rows += (load_row(x, left, start + i - (W - 1), T, o_d, mask_d, x_stride_t, D, W, INNER),)
    b_rows += b_later_rows
    for i in tl.static_range(U):
        b_p = sum_gradient(
            dy, b_rows, b_taps, b_bias, positions, start + i, T, o_d, mask_d, dy_stride_t, i, W,
            SILU, INNER,
        )  # fmt: skip
        b_ps += (b_p,)
        b_dbias += b_p
    b_ps += b_later_ps
    for i in tl.static_range(U):
        t = start + i
        b_dx = b_taps[0] * b_ps[i]
        for j in tl.static_range(1, W):
            position = load_position(positions, t + j, T, INNER)
            b_dx += tap_product(b_taps[j], b_ps[i + j], position, j, INNER)
        b_dx = b_dx.to(dx.dtype.element_ty)
        if INNER:
            tl.store(dx + t * D + o_d, b_dx, mask=mask_d)
        else:
            tl.store(dx + t * D + o_d, b_dx, mask=where(mask_d, (t >= 0) & (t < end)))
            before = (t < 0) & (t > -W)
            tl.store(dleft + (t + W - 1) * D + o_d, b_dx, mask=where(mask_d, before))
    b_sums, b_first_rows, b_first_ps = (), (), ()
    for j in tl.static_range(W):
        b_sum = b_dtaps[j]
        for i in tl.static_range(U):
            position = load_position(positions, start + i, T, INNER)
            b_sum += tap_product(b_ps[i], b_rows[i + W - 1 - j], position, j, INNER)
        b_sums += (b_sum,)
    for i in tl.static_range(W - 1):
        b_first_rows += (b_rows[i],)
        b_first_ps += (b_ps[i],)
    return b_first_rows, b_first_ps, b_sums, b_dbias


@Kernel
@triton.jit
def short_convolution_backward_kernel(
    x, weight, bias, left, positions, dy, dx, dleft, dweight, dbias,
    T, segment, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, D,
    W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """dx of a segment's tokens, and its part of the weight's and bias' gradients.

        p_t = dy_t, times silu' of the sum        dx_t = Σ_{j < W, j ≤ positions_{t+j}} w_j p_{t+j}
        dw_j = Σ_{t, j ≤ positions_t} p_t x_{t-j}

    Grid: (blocks of D, S, B). Reads x and dy, writes dx: 6 bytes a number in bf16. Walks back in
    time, so that a step finds p of the tokens after it, and the x that it shares with them, in
    registers. The first segment goes on to left's tokens. dweight: fp32 [B, S, W, D] by distance;
    dbias: fp32 [B, S, D].
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = i_s.to(tl.int64) * segment
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d = o_d < D
    x += i_b * x_stride_b
    dy += i_b * dy_stride_b
    left += i_b * (W - 1) * D
    dleft += i_b * (W - 1) * D
    positions += i_b * T
    dx += i_b * T * D
    b_taps = load_taps(weight, o_d, mask_d, W)
    b_bias = load_bias(bias, o_d, mask_d, BIAS)
    end = tl.minimum(first + segment, T)
    steps = tl.cdiv(end - first, U)
    after = first + steps * U
    b_edge, b_later_rows, b_later_ps, b_dtaps = (), (), (), ()
    for i in tl.static_range(2 * (W - 1)):
        b_edge += (load_row(x, left, after + i - (W - 1), T, o_d, mask_d, x_stride_t, D, W, False),)
    for i in tl.static_range(W - 1):
        b_later_rows += (b_edge[i],)
        b_later_ps += (
            sum_gradient(
                dy, b_edge, b_taps, b_bias, positions, after + i, T, o_d, mask_d, dy_stride_t, i,
                W, SILU, False,
            ),
        )  # fmt: skip
    for _j in tl.static_range(W):
        b_dtaps += (tl.zeros([BD], dtype=tl.float32),)
    b_state = (b_later_rows, b_later_ps, b_dtaps, tl.zeros([BD], dtype=tl.float32))
    for i_step in range(steps + tl.where(i_s == 0, 1, 0)):
        start = after - (i_step + 1) * U
        if all_inner(positions, start, T, W, U, W - 1):
            b_state = backward_step(
                x, left, positions, dy, dx, dleft, b_taps, b_bias, b_state, start, end, T, o_d,
                mask_d, x_stride_t, dy_stride_t, D, W, U, SILU, True,
            )  # fmt: skip
        else:
            b_state = backward_step(
                x, left, positions, dy, dx, dleft, b_taps, b_bias, b_state, start, end, T, o_d,
                mask_d, x_stride_t, dy_stride_t, D, W, U, SILU, False,
            )  # fmt: skip
    stretch = i_b * tl.num_programs(1) + i_s
    for j in tl.static_range(W):
        tl.store(dweight + (stretch * W + j) * D + o_d, b_state[2][j], mask=mask_d)
    tl.store(dbias + stretch * D + o_d, b_state[3], mask=mask_d)


@torch.library.custom_op("fla_dist::short_convolution", mutates_args=())
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, positions: Tensor, silu: bool
) -> Tensor:
    """y [B, T, D] in x's dtype."""
    batch, length, channels = x.shape
    y = x.new_empty(batch, length, channels)
    grid = (triton.cdiv(channels, CHANNELS), triton.cdiv(length, STEP), batch)
    short_convolution_kernel[grid](
        x, weight, weight if bias is None else bias, left, positions, y,
        length, x.stride(0), x.stride(1), channels,
        W=weight.shape[1], U=STEP, BD=CHANNELS, BIAS=bias is not None, SILU=silu,
        num_warps=WARPS,
    )  # fmt: skip
    return y


@convolution.register_fake
def _(x, weight, bias, left, positions, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("fla_dist::short_convolution_backward", mutates_args=())
def convolution_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, positions: Tensor, dy: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the weight, the bias (of zeros where there is none) and left."""
    batch, length, channels = x.shape
    width, count = weight.shape[1], triton.cdiv(length, SEGMENT)
    dx, dleft = x.new_empty(x.shape), torch.empty_like(left)
    dweight = x.new_empty(batch, count, width, channels, dtype=torch.float32)
    dbias = x.new_empty(batch, count, channels, dtype=torch.float32)
    short_convolution_backward_kernel[(triton.cdiv(channels, CHANNELS), count, batch)](
        x, weight, weight if bias is None else bias, left, positions, dy, dx, dleft, dweight, dbias,
        length, SEGMENT, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), channels,
        W=width, U=BACKWARD_STEP, BD=CHANNELS, BIAS=bias is not None, SILU=silu,
        num_warps=WARPS,
    )  # fmt: skip
    by_distance = dweight.sum(dim=(0, 1))
    dweight = by_distance.flip(0).t().contiguous().to(weight.dtype)
    return dx, dweight, dbias.sum(dim=(0, 1)).to((weight if bias is None else bias).dtype), dleft


@convolution_backward.register_fake
def _(x, weight, bias, left, positions, dy, silu):
    dbias = weight.new_empty(weight.shape[0]) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), torch.empty_like(weight), dbias, torch.empty_like(left)


def _keep(ctx, inputs, output):
    x, weight, bias, left, positions, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, left, positions)


def _backward(ctx, dy):
    x, weight, bias, left, positions = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx, dweight, dbias, dleft = convolution_backward(x, weight, bias, left, positions, dy, ctx.silu)
    return dx, dweight, None if bias is None else dbias, dleft, None, None


convolution.register_autograd(_backward, setup_context=_keep)
