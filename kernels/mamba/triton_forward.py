"""The selective scan's forward in Triton: summarize segments, fold them, walk them.

Notation: B batch, T tokens, D channels, N state numbers a channel, S segments, L tokens between
checkpoints. x, dt, y are [B, T, D]; B, C are fp32 [B, T, N]; `rate` is log2(e) · A, fp32 [D, N];
states are fp32 [B, S, D, N]. `b_*` are blocks in registers, `p_*` pointers, `o_*` offsets.

A program owns BD channels of a segment and holds their states, [BD, BN], in the registers of one
warp. N lies across a few lanes and four numbers a thread (the layout of rate's own loads), so that
a token's B and C are one 16-byte load each and a sum over N is two shuffles. Tokens are walked one
after the other; the loads of UNROLL tokens are in flight together. The exponential is what should
bound these kernels: one a (token, channel, state number) and pass.
"""

# Tuples of blocks grow while their loops are unrolled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.state import RESET

LOG2_E = 1.4426950408889634
SEGMENT = 256
"""Tokens of a segment: short, so that one sequence fills the GPU; the states of all segments take
an eighth of x in bf16."""
CHECKPOINT = 16
"""Tokens between the states that the forward keeps for the backward."""
UNROLL, OUTPUT_UNROLL, WARPS = 4, 8, 1


@triton.jit
def load_channels(p, mask):
    """One token's numbers of BD channels, [BD, 1]."""
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_states(p, mask):
    """One token's B or C, [1, BN]."""
    return tl.load(p, mask=mask, other=0.0)[None, :]


@triton.jit
def checkpoint_offsets(o_d, o_n, D):
    """[BN / 4, D, 4]: only four numbers side by side, so that states kept in bf16 are loaded in the
    register layout of fp32."""
    return ((o_n // 4)[None, :] * D + o_d[:, None]) * 4 + (o_n % 4)[None, :]


@triton.jit
def decay(b_dt, b_rate, p_reset, inside, PACKED: tl.constexpr):
    """exp(Δ A) of a token, or 0 where a document starts there."""
    b_exponent = b_dt * b_rate
    if PACKED:
        b_exponent += tl.load(p_reset, mask=inside, other=0.0)
    return tl.exp2(b_exponent)


@triton.jit
def summarize_kernel(
    x, dt, rate, B, reset, state, log_decay,
    T, segment, x_stride_b, dt_stride_b,
    D: tl.constexpr, N: tl.constexpr, x_stride_t: tl.constexpr, dt_stride_t: tl.constexpr,
    RESET: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The state that a segment's tokens leave at its end, and the sum of its Δ.

    Grid: (blocks of D, S, B). Reads x, dt and B once.
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d, mask_n = (o_d < D) | EVEN, (o_n < N) | EVEN
    o_dn, mask = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
    x += i_b * x_stride_b + o_d
    dt += i_b * dt_stride_b + o_d
    B += i_b * T * N + o_n
    reset += i_b * T
    b_rate = tl.load(rate + o_dn, mask=mask, other=0.0)
    b_h = tl.zeros([BD, BN], dtype=tl.float32)
    b_total = tl.zeros([BD, 1], dtype=tl.float32)
    restarts = 0.0
    first = i_s.to(tl.int64) * segment
    for start in range(first, tl.minimum(first + segment, T), UNROLL):
        p_x, p_dt = x + start * x_stride_t, dt + start * dt_stride_t
        p_B, p_reset = B + start * N, reset + start
        b_x, b_dt, b_B = (), (), ()
        for i in tl.static_range(UNROLL):
            inside = (start + i < T) | EVEN
            b_x += (load_channels(p_x + i * x_stride_t, mask_d & inside),)
            b_dt += (load_channels(p_dt + i * dt_stride_t, mask_d & inside),)
            b_B += (load_states(p_B + i * N, mask_n & inside),)
        for i in tl.static_range(UNROLL):
            inside = (start + i < T) | EVEN
            b_total += b_dt[i]
            b_a = decay(b_dt[i], b_rate, p_reset + i, inside, PACKED)
            b_h = b_a * b_h + (b_dt[i] * b_x[i]) * b_B[i]
            if PACKED:
                restarts += tl.load(p_reset + i, mask=inside, other=0.0)
    if PACKED:
        b_total = tl.where(restarts < 0.0, -RESET, b_total)
    stretch = i_b * tl.num_programs(1) + i_s
    tl.store(state + stretch * D * N + o_dn, b_h, mask=mask)
    tl.store(log_decay + stretch * D + o_d[:, None], b_total, mask=mask_d[:, None])


@triton.jit
def fold_kernel(
    log_decay, rate, state, initial, entries, final,
    S, D: tl.constexpr, N: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The state that enters each of S segments, one after the other.

    Grid: (blocks of D · N, B). Reads and writes each segment's state once.
    """
    i_b = tl.program_id(1).to(tl.int64)
    size = D * N
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    log_decay += o // N
    b_rate = tl.load(rate + o, mask=mask, other=0.0)
    b_h = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_INITIAL:
        b_h += tl.load(initial + i_b * size + o, mask=mask, other=0.0)
    for start in range(0, S, UNROLL):
        b_added, b_total = (), ()
        for i in tl.static_range(UNROLL):
            stretch = i_b * S + (S - 1 - start - i if REVERSE else start + i)
            inside = mask & (start + i < S)
            b_added += (tl.load(state + stretch * size + o, mask=inside, other=0.0),)
            b_total += (tl.load(log_decay + stretch * D, mask=inside, other=0.0),)
        for i in tl.static_range(UNROLL):
            stretch = i_b * S + (S - 1 - start - i if REVERSE else start + i)
            tl.store(entries + stretch * size + o, b_h, mask=mask & (start + i < S))
            b_h = tl.exp2(b_total[i] * b_rate) * b_h + b_added[i]
    tl.store(final + i_b * size + o, b_h, mask=mask)


@triton.jit
def output_kernel(
    x, dt, rate, B, C, reset, entries, y, checkpoints,
    T, segment, x_stride_b, dt_stride_b,
    D: tl.constexpr, N: tl.constexpr, x_stride_t: tl.constexpr, dt_stride_t: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr, L: tl.constexpr,
    PACKED: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y of a segment's tokens; with SAVE also the state before every L-th token.

    Grid: (blocks of D, S, B). Reads x, dt, B, C once, writes y once.
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d, mask_n = (o_d < D) | EVEN, (o_n < N) | EVEN
    o_dn, mask = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
    x += i_b * x_stride_b + o_d
    dt += i_b * dt_stride_b + o_d
    y += i_b * T * D
    o_u = tl.arange(0, UNROLL)
    B += i_b * T * N + o_n
    C += i_b * T * N + o_n
    reset += i_b * T
    checkpoints += i_b * tl.cdiv(T, L) * D * BN
    b_rate = tl.load(rate + o_dn, mask=mask, other=0.0)
    stretch = i_b * tl.num_programs(1) + i_s
    b_h = tl.load(entries + stretch * D * N + o_dn, mask=mask, other=0.0)
    first = i_s.to(tl.int64) * segment
    for start in range(first, tl.minimum(first + segment, T), UNROLL):
        p_x, p_dt = x + start * x_stride_t, dt + start * dt_stride_t
        p_y = y + start * D + o_d[:, None]
        p_B, p_C, p_reset = B + start * N, C + start * N, reset + start
        b_x, b_dt, b_B, b_C = (), (), (), ()
        for i in tl.static_range(UNROLL):
            inside = (start + i < T) | EVEN
            b_x += (load_channels(p_x + i * x_stride_t, mask_d & inside),)
            b_dt += (load_channels(p_dt + i * dt_stride_t, mask_d & inside),)
            b_B += (load_states(p_B + i * N, mask_n & inside),)
            b_C += (load_states(p_C + i * N, mask_n & inside),)
        b_y = tl.zeros([BD, UNROLL], dtype=tl.float32)
        if SAVE:
            if start % L == 0:
                p_checkpoint = checkpoints + (start // L) * D * BN + checkpoint_offsets(o_d, o_n, D)
                tl.store(p_checkpoint, b_h.to(checkpoints.dtype.element_ty), mask=mask)
        for i in tl.static_range(UNROLL):
            inside = (start + i < T) | EVEN
            b_a = decay(b_dt[i], b_rate, p_reset + i, inside, PACKED)
            b_h = b_a * b_h + (b_dt[i] * b_x[i]) * b_B[i]
            b_y = tl.where(o_u[None, :] == i, tl.sum(b_h * b_C[i], axis=1)[:, None], b_y)
        mask_y = mask_d[:, None] & ((start + o_u < T) | EVEN)[None, :]
        tl.store(p_y + o_u[None, :] * D, b_y.to(y.dtype.element_ty), mask=mask_y)


def segments(length: int) -> int:
    return -(-length // SEGMENT)


def padded(size: int) -> int:
    """N as blocks take it."""
    return max(4, triton.next_power_of_2(size))


def block_size(size: int) -> int:
    """Channels of a program: so many that a thread holds at most eight states."""
    return min(16, 256 // padded(size))


def even(x: Tensor, size: int) -> bool:
    """Whether blocks divide all axes, so that nothing needs a mask."""
    _, length, channels = x.shape
    whole = length % CHECKPOINT == 0 and channels % block_size(size) == 0
    return whole and size == padded(size)


def checkpoint_dtype(x: Tensor) -> torch.dtype:
    """Where everything else is rounded to bf16 the kept states may be, too; fp16's range may not
    hold them."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


@torch.library.custom_op("fla_dist::selective_scan_summarize", mutates_args=())
def summarize(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, D, N], and the sum of its Δ, [B, S, D, 1]."""
    batch, length, channels = x.shape
    count, size = segments(length), rate.shape[1]
    state = rate.new_empty(batch, count, channels, size)
    log_decay = rate.new_empty(batch, count, channels, 1)
    summarize_kernel[(triton.cdiv(channels, block_size(size)), count, batch)](
        x, dt, rate, B, rate if reset is None else reset, state, log_decay,
        length, SEGMENT, x.stride(0), dt.stride(0),
        D=channels, N=size, x_stride_t=x.stride(1), dt_stride_t=dt.stride(1),
        RESET=RESET, BD=block_size(size), BN=padded(size), UNROLL=UNROLL, PACKED=reset is not None,
        EVEN=even(x, size), num_warps=WARPS,
    )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(x, dt, rate, B, reset):
    shape = (x.shape[0], segments(x.shape[1]), x.shape[2])
    return rate.new_empty(*shape, rate.shape[1]), rate.new_empty(*shape, 1)


@torch.library.custom_op("fla_dist::selective_scan_fold", mutates_args=())
def fold(
    log_decay: Tensor, rate: Tensor, state: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """`fla_dist.kernels.state.fold` on the GPU: what enters each segment [B, S, D, N], and what
    leaves the last [B, D, N]."""
    batch, count, channels, size = state.shape
    entries, final = torch.empty_like(state), torch.empty_like(state[:, 0])
    numbers = 256
    fold_kernel[(triton.cdiv(channels * size, numbers), batch)](
        log_decay, rate, state, rate if initial is None else initial, entries, final,
        count, D=channels, N=size,
        HAS_INITIAL=initial is not None, REVERSE=reverse, BLOCK=numbers, UNROLL=8, num_warps=4,
    )  # fmt: skip
    return entries, final


@fold.register_fake
def _(log_decay, rate, state, initial, reverse):
    return torch.empty_like(state), torch.empty_like(state[:, 0])


@torch.library.custom_op("fla_dist::selective_scan_output", mutates_args=())
def output(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, reset: Tensor | None,
    entries: Tensor, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, T, D], and the states before every CHECKPOINT-th token (empty unless `save`)."""
    batch, length, channels = x.shape
    size = rate.shape[1]
    y = x.new_empty(batch, length, channels)
    checkpoints = x.new_empty(_checkpoints(x, size, save), dtype=checkpoint_dtype(x))
    output_kernel[(triton.cdiv(channels, block_size(size)), segments(length), batch)](
        x, dt, rate, B, C, rate if reset is None else reset, entries, y, checkpoints,
        length, SEGMENT, x.stride(0), dt.stride(0),
        D=channels, N=size, x_stride_t=x.stride(1), dt_stride_t=dt.stride(1),
        BD=block_size(size), BN=padded(size), UNROLL=OUTPUT_UNROLL, L=CHECKPOINT,
        PACKED=reset is not None, SAVE=save, EVEN=even(x, size), num_warps=WARPS,
    )  # fmt: skip
    return y, checkpoints


def _checkpoints(x: Tensor, size: int, save: bool) -> tuple[int, ...]:
    return (x.shape[0], -(-x.shape[1] // CHECKPOINT), x.shape[2], padded(size)) if save else (0,)


@output.register_fake
def _(x, dt, rate, B, C, reset, entries, save):
    checkpoints = x.new_empty(_checkpoints(x, rate.shape[1], save), dtype=checkpoint_dtype(x))
    return x.new_empty(x.shape), checkpoints
