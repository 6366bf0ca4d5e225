"""The selective scan's forward in Triton: summarize segments, fold them, walk them.

Notation: B batch, T tokens, D channels, N state numbers a channel, S segments, L tokens between
checkpoints, H tokens of a tile. x, dt, z, y are [B, T, D]; B, C are fp32 [B, T, N]; `rate` is
log2(e) · A, fp32 [D, N]; states are fp32 [B, S, D, N]. `b_*` are blocks in registers, `p_*`
pointers, `o_*` offsets.

A program owns BD channels of a segment and holds their states, [BD, BN], in the registers of one
warp. N lies across a few lanes and four numbers a thread (the layout of rate's own loads), so that
a token's B and C are one 16-byte load each and a sum over N is two shuffles. Channels' numbers come
in tiles of H tokens, [BD, H], spread over the warp: there, where each number is held once, go
softplus, gate and D · x. `rows` then gives each thread its channels of every token by one exchange
through shared memory, and tokens are walked one after the other. The exponential of the decay
should bound these kernels: one a (token, channel, state number) and pass.
"""

# Tuples of blocks grow while their loops are unrolled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.state import RESET

LOG2_E = 1.4426950408889634
SEGMENT = 256
"""Tokens of a segment: short, so that one sequence fills the GPU; the states of all segments take
an eighth of x in bf16."""
TILE = 8
"""Tokens of a tile."""
CHECKPOINT = 16
"""Tokens between the states that the forward keeps for the backward."""
WARPS = 1
PASS_NONE: tl.constexpr = tl.constexpr(-RESET)
"""The Δ of a decay that lets nothing pass: where a document starts."""


@triton.jit
def load(p, mask, EVEN: tl.constexpr):
    """EVEN: blocks divide all axes, nothing needs a mask. (A mask combined with a comparison of
    numbers is an integer in the interpreter of Triton 3.9.)"""
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=mask != 0, other=0.0)


@triton.jit
def store(p, value, mask, EVEN: tl.constexpr):
    value = value.to(p.dtype.element_ty)
    if EVEN:
        tl.store(p, value)
    else:
        tl.store(p, value, mask=mask)


@triton.jit
def rows(b_tile, M: tl.constexpr, H: tl.constexpr, LOG_H: tl.constexpr):
    """The columns of [M, H], each [M]."""
    b_rows = (b_tile,)
    for level in tl.static_range(LOG_H):
        b_even, b_odd = (), ()
        for i in tl.static_range(1 << level):
            b_pair = tl.split(tl.reshape(b_rows[i], [M, H >> (level + 1), 2]))
            b_even += (b_pair[0],)
            b_odd += (b_pair[1],)
        b_rows = b_even + b_odd
    b_flat = ()
    for i in tl.static_range(H):
        b_flat += (tl.reshape(b_rows[i], [M]),)
    return b_flat


@triton.jit
def row_pairs(b_first, b_second, M: tl.constexpr, H: tl.constexpr, LOG_H: tl.constexpr):
    """`rows` of two tiles by one exchange: H pairs. In fp32: each number of the tiles is converted
    once, before."""
    b_both = tl.reshape(tl.trans(tl.join(b_first, b_second), 0, 2, 1), [2 * M, H])
    b_rows = rows(b_both, 2 * M, H, LOG_H)
    b_pairs = ()
    for i in tl.static_range(H):
        b_pairs += (tl.split(tl.reshape(b_rows[i], [M, 2])),)
    return b_pairs


@triton.jit
def add_lanes(
    b_parts, M: tl.constexpr, G: tl.constexpr, LOG_G: tl.constexpr, H: tl.constexpr,
    LOG_H: tl.constexpr,
):  # fmt: skip
    """[M, H] from H parts [M, G]: their sums over G, which lies across lanes. One exchange through
    shared memory and additions, in place of shuffles for every part."""
    b_joined = b_parts
    for level in tl.static_range(LOG_H):
        b_pairs = ()
        for i in tl.static_range(H >> (level + 1)):
            b_pairs += (tl.join(b_joined[i], b_joined[i + (H >> (level + 1))]),)
        b_joined = b_pairs
    b_sum = tl.trans(tl.reshape(b_joined[0], [M, G, H]), 0, 2, 1)
    for level in tl.static_range(LOG_G):
        b_half, b_other = tl.split(tl.reshape(b_sum, [M, H, G >> (level + 1), 2]))
        b_sum = b_half + b_other
    return tl.reshape(b_sum, [M, H])


@triton.jit
def add_numbers(b_x, BD: tl.constexpr, BN: tl.constexpr):
    """[BD, BN / 4]: the sums over a thread's own four state numbers."""
    return tl.sum(tl.reshape(b_x, [BD, BN // 4, 4]), axis=2)


@triton.jit
def checkpoint_offsets(o_d, o_n, D):
    """[BN / 4, D, 4]: only four numbers side by side, so that states kept in bf16 are loaded in the
    register layout of fp32."""
    return ((o_n // 4)[None, :] * D + o_d[:, None]) * 4 + (o_n % 4)[None, :]


@triton.jit
def softplus(b_x):
    """max(x, 0) + log(1 + exp(-|x|)); the logarithm as 2 atanh(w / (2 + w)), whose series keeps the
    relative accuracy of small steps."""
    b_w = tl.exp2(-1.4426950408889634 * tl.abs(b_x))
    b_s = b_w / (2.0 + b_w)
    b_square = b_s * b_s
    b_sum = 1.0 / 15 + b_square * (1.0 / 17)
    b_sum = 1.0 / 13 + b_square * b_sum
    b_sum = 1.0 / 11 + b_square * b_sum
    b_sum = 1.0 / 9 + b_square * b_sum
    b_sum = 1.0 / 7 + b_square * b_sum
    b_sum = 1.0 / 5 + b_square * b_sum
    b_sum = 1.0 / 3 + b_square * b_sum
    return tl.maximum(b_x, 0.0) + 2.0 * b_s * (1.0 + b_square * b_sum)


@triton.jit
def time_steps(b_raw, b_bias, mask, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
    """Δ of a tile; 0 beyond the last token."""
    b_dt = b_raw.to(tl.float32)
    if SOFTPLUS:
        b_dt = softplus(b_dt + b_bias[:, None])
        if not EVEN:
            b_dt = tl.where(mask, b_dt, 0.0)
    return b_dt


@triton.jit
def passing(b_dt, doc_ids, o_t, first, length, PACKED: tl.constexpr, EVEN: tl.constexpr):
    """Δ as the decay takes it: so large where a document starts that nothing passes."""
    if PACKED:
        b_document = load(doc_ids + o_t, o_t < length, EVEN)
        b_before = tl.load(doc_ids + o_t - 1, mask=(first + o_t > 0) & (o_t <= length), other=0)
        starts = (b_document != b_before) & (o_t < length)
        b_dt = tl.where(starts[None, :], PASS_NONE, b_dt)
    return b_dt


@triton.jit
def load_bias(bias, o_d, mask_d, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
    if SOFTPLUS:
        return load(bias + o_d, mask_d, EVEN).to(tl.float32)
    else:
        return tl.zeros(o_d.shape, dtype=tl.float32)


@Kernel
@triton.jit
def summarize_kernel(
    x, dt, rate, B, bias, doc_ids, state, log_decay,
    T, segment, x_stride_b, dt_stride_b,
    D: tl.constexpr, N: tl.constexpr, x_stride_t: tl.constexpr, dt_stride_t: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, H: tl.constexpr, LOG_H: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The state that a segment's tokens leave at its end, and the sum of its Δ.

    Grid: (blocks of D, S, B). Reads x, dt and B once.
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    o_h = tl.arange(0, H)
    mask_d, mask_n = o_d < D, o_n < N
    o_dn, mask_dn = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
    first = i_s.to(tl.int64) * segment
    length = tl.minimum(segment, T - first).to(tl.int32)
    x += i_b * x_stride_b + first * x_stride_t + o_h[None, :] * x_stride_t + o_d[:, None]
    dt += i_b * dt_stride_b + first * dt_stride_t + o_h[None, :] * dt_stride_t + o_d[:, None]
    B += (i_b * T + first) * N + o_n
    doc_ids += i_b * T + first
    b_rate = load(rate + o_dn, mask_dn, EVEN)
    b_bias = load_bias(bias, o_d, mask_d, SOFTPLUS, EVEN)
    b_h = tl.zeros([BD, BN], dtype=tl.float32)
    b_passed = tl.zeros([BD, H], dtype=tl.float32)
    mask = mask_d[:, None] & (o_h < length)[None, :]
    b_x, b_raw = load(x, mask, EVEN), load(dt, mask, EVEN)
    for start in range(0, length, H):
        ahead = tl.minimum(start + H, (length - 1) // H * H)
        mask = mask_d[:, None] & (ahead + o_h < length)[None, :]
        b_next_x = load(x + ahead * x_stride_t, mask, EVEN)
        b_next_raw = load(dt + ahead * dt_stride_t, mask, EVEN)
        mask = mask_d[:, None] & (start + o_h < length)[None, :]
        b_dt = time_steps(b_raw, b_bias, mask, SOFTPLUS, EVEN)
        b_pass = passing(b_dt, doc_ids, start + o_h, first, length, PACKED, EVEN)
        b_passed += b_pass
        b_steps = row_pairs(b_pass, b_dt * b_x.to(tl.float32), BD, H, LOG_H)
        for i in tl.static_range(H):
            b_B = load(B + (start + i) * N, mask_n & (start + i < length), EVEN)
            b_a = tl.exp2(b_steps[i][0][:, None] * b_rate)
            b_h = b_a * b_h + b_steps[i][1][:, None] * b_B[None, :]
        b_x, b_raw = b_next_x, b_next_raw
    b_total = tl.minimum(tl.sum(b_passed, axis=1), PASS_NONE)
    stretch = i_b * tl.num_programs(1) + i_s
    store(state + stretch * D * N + o_dn, b_h, mask_dn, EVEN)
    store(log_decay + stretch * D + o_d, b_total, mask_d, EVEN)


@Kernel
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
            inside = (mask & (start + i < S)) != 0
            b_added += (tl.load(state + stretch * size + o, mask=inside, other=0.0),)
            b_total += (tl.load(log_decay + stretch * D, mask=inside, other=0.0),)
        for i in tl.static_range(UNROLL):
            stretch = i_b * S + (S - 1 - start - i if REVERSE else start + i)
            tl.store(entries + stretch * size + o, b_h, mask=(mask & (start + i < S)) != 0)
            b_h = tl.exp2(b_total[i] * b_rate) * b_h + b_added[i]
    tl.store(final + i_b * size + o, b_h, mask=mask)


@Kernel
@triton.jit
def output_kernel(
    x, dt, rate, B, C, bias, skip, z, doc_ids, entries, y, checkpoints,
    T, segment, x_stride_b, dt_stride_b, z_stride_b,
    D: tl.constexpr, N: tl.constexpr, x_stride_t: tl.constexpr, dt_stride_t: tl.constexpr,
    z_stride_t: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, LOG_G: tl.constexpr,
    H: tl.constexpr, LOG_H: tl.constexpr, L: tl.constexpr,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """y of a segment's tokens; with SAVE also the state before every L-th token.

    Grid: (blocks of D, S, B). Reads x, dt, z, B, C once, writes y once.
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    o_h = tl.arange(0, H)
    mask_d, mask_n = o_d < D, o_n < N
    o_dn, mask_dn = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
    first = i_s.to(tl.int64) * segment
    length = tl.minimum(segment, T - first).to(tl.int32)
    x += i_b * x_stride_b + first * x_stride_t + o_h[None, :] * x_stride_t + o_d[:, None]
    dt += i_b * dt_stride_b + first * dt_stride_t + o_h[None, :] * dt_stride_t + o_d[:, None]
    z += i_b * z_stride_b + first * z_stride_t + o_h[None, :] * z_stride_t + o_d[:, None]
    y += (i_b * T + first) * D + o_h[None, :] * D + o_d[:, None]
    B += (i_b * T + first) * N + o_n
    C += (i_b * T + first) * N + o_n
    doc_ids += i_b * T + first
    checkpoints += (i_b * tl.cdiv(T, L) + first // L) * D * BN + checkpoint_offsets(o_d, o_n, D)
    b_rate = load(rate + o_dn, mask_dn, EVEN)
    b_bias = load_bias(bias, o_d, mask_d, SOFTPLUS, EVEN)
    b_skip = load(skip + o_d, mask_d, EVEN)
    stretch = i_b * tl.num_programs(1) + i_s
    b_h = load(entries + stretch * D * N + o_dn, mask_dn, EVEN)
    mask = mask_d[:, None] & (o_h < length)[None, :]
    b_x, b_raw = load(x, mask, EVEN), load(dt, mask, EVEN)
    b_z = b_x
    if GATED:
        b_z = load(z, mask, EVEN)
    for start in range(0, length, H):
        ahead = tl.minimum(start + H, (length - 1) // H * H)
        mask = mask_d[:, None] & (ahead + o_h < length)[None, :]
        b_next_x = load(x + ahead * x_stride_t, mask, EVEN)
        b_next_raw = load(dt + ahead * dt_stride_t, mask, EVEN)
        b_next_z = b_next_x
        if GATED:
            b_next_z = load(z + ahead * z_stride_t, mask, EVEN)
        mask = mask_d[:, None] & (start + o_h < length)[None, :]
        b_input = b_x.to(tl.float32)
        b_dt = time_steps(b_raw, b_bias, mask, SOFTPLUS, EVEN)
        b_pass = passing(b_dt, doc_ids, start + o_h, first, length, PACKED, EVEN)
        b_steps = row_pairs(b_pass, b_dt * b_input, BD, H, LOG_H)
        if SAVE:
            if start % L == 0:
                store(checkpoints + (start // L) * D * BN, b_h, mask_dn, EVEN)
        b_ys = ()
        for i in tl.static_range(H):
            mask_i = mask_n & (start + i < length)
            b_B = load(B + (start + i) * N, mask_i, EVEN)
            b_C = load(C + (start + i) * N, mask_i, EVEN)
            b_a = tl.exp2(b_steps[i][0][:, None] * b_rate)
            b_h = b_a * b_h + b_steps[i][1][:, None] * b_B[None, :]
            b_ys += (add_numbers(b_h * b_C[None, :], BD, BN),)
        b_y = add_lanes(b_ys, BD, BN // 4, LOG_G, H, LOG_H) + b_skip[:, None] * b_input
        if GATED:
            b_gate = b_z.to(tl.float32)
            b_y *= b_gate * tl.sigmoid(b_gate)
        store(y + start * D, b_y, mask, EVEN)
        b_x, b_raw, b_z = b_next_x, b_next_raw, b_next_z


def segments(length: int) -> int:
    return -(-length // SEGMENT)


def padded(size: int) -> int:
    """N as blocks take it."""
    return max(4, triton.next_power_of_2(size))


def log2(number: int) -> int:
    """Of a power of two."""
    return number.bit_length() - 1


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
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, bias: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, S, D, N], and the sum of its Δ, [B, S, D, 1]."""
    batch, length, channels = x.shape
    count, size = segments(length), rate.shape[1]
    state = rate.new_empty(batch, count, channels, size)
    log_decay = rate.new_empty(batch, count, channels, 1)
    summarize_kernel[(triton.cdiv(channels, block_size(size)), count, batch)](
        x, dt, rate, B, rate if bias is None else bias, rate if doc_ids is None else doc_ids,
        state, log_decay,
        length, SEGMENT, x.stride(0), dt.stride(0),
        D=channels, N=size, x_stride_t=x.stride(1), dt_stride_t=dt.stride(1),
        BD=block_size(size), BN=padded(size), H=TILE, LOG_H=log2(TILE),
        SOFTPLUS=bias is not None, PACKED=doc_ids is not None, EVEN=even(x, size),
        num_warps=WARPS,
    )  # fmt: skip
    return state, log_decay


@summarize.register_fake
def _(x, dt, rate, B, bias, doc_ids):
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
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, skip: Tensor,
    z: Tensor | None, doc_ids: Tensor | None, entries: Tensor, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, T, D], and the states before every CHECKPOINT-th token (empty unless `save`)."""
    batch, length, channels = x.shape
    size = rate.shape[1]
    y = x.new_empty(batch, length, channels)
    checkpoints = x.new_empty(_checkpoints(x, size, save), dtype=checkpoint_dtype(x))
    gate = x if z is None else z
    output_kernel[(triton.cdiv(channels, block_size(size)), segments(length), batch)](
        x, dt, rate, B, C, rate if bias is None else bias, skip, gate,
        rate if doc_ids is None else doc_ids, entries, y, checkpoints,
        length, SEGMENT, x.stride(0), dt.stride(0), gate.stride(0),
        D=channels, N=size, x_stride_t=x.stride(1), dt_stride_t=dt.stride(1),
        z_stride_t=gate.stride(1), BD=block_size(size), BN=padded(size),
        LOG_G=log2(padded(size) // 4), H=TILE, LOG_H=log2(TILE), L=CHECKPOINT,
        SOFTPLUS=bias is not None, GATED=z is not None, PACKED=doc_ids is not None, SAVE=save,
        EVEN=even(x, size), num_warps=WARPS,
    )  # fmt: skip
    return y, checkpoints


def _checkpoints(x: Tensor, size: int, save: bool) -> tuple[int, ...]:
    return (x.shape[0], -(-x.shape[1] // CHECKPOINT), x.shape[2], padded(size)) if save else (0,)


@output.register_fake
def _(x, dt, rate, B, C, bias, skip, z, doc_ids, entries, save):
    checkpoints = x.new_empty(_checkpoints(x, rate.shape[1], save), dtype=checkpoint_dtype(x))
    return x.new_empty(x.shape), checkpoints
