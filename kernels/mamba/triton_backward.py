"""The selective scan's backward in Triton; notation and layout as in triton_forward.py.

With a_t = exp(Δ_t A), u_t = Δ_t x_t, o_t the gradient of h_t · C_t + D x_t (dy_t, times silu(z_t)
where there is a gate), and e_t what the tokens after t send to h_t:

    g_t = e_t + o_t C_t         e_{t-1} = a_t ⊙ g_t
    dC_t = Σ_D o_t h_t          dB_t = Σ_D u_t g_t           dA = Σ_T Δ_t e_{t-1} ⊙ h_{t-1}
    dx_t = Δ_t g_t · B_t + D o_t                             dD = Σ_T o_t x_t
    dΔ_t = x_t g_t · B_t + A · (e_{t-1} ⊙ h_{t-1})           times sigmoid(Δ's argument) with a bias
    dz_t = dy_t (h_t · C_t + D x_t) silu'(z_t)

States are recomputed from checkpoints, in order, and walked back. h_{t-1} is what was recomputed,
never (h_t - u_t B_t) / a_t, which a strong decay would turn into noise.
"""

# Tuples of blocks grow while their loops are unrolled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.mamba import triton_forward as forward
from fla_dist.kernels.mamba.triton_forward import (
    CHECKPOINT,
    LOG2_E,
    add_lanes,
    add_numbers,
    block_size,
    checkpoint_offsets,
    even,
    load,
    load_bias,
    log2,
    padded,
    passing,
    row_pairs,
    rows,
    segments,
    store,
    time_steps,
)

TILE = 4
"""Tokens whose states a program holds at once."""
assert CHECKPOINT == 4 * TILE
PROGRAMS = 1024
"""Programs of the backward where the sequence is long: eight a multiprocessor run at once. Those of
a segment share its channels, and each adds dB and dC of its channels up in memory of its own: no
atomics, and few partial sums."""


@triton.jit
def load_tiles(p_dt, p_dy, p_z, mask, GATED: tl.constexpr, EVEN: tl.constexpr):
    """Tiles of dt, dy and z; dy's in place of z's where there is no gate."""
    b_raw, b_dy = load(p_dt, mask, EVEN), load(p_dy, mask, EVEN)
    b_z = b_dy
    if GATED:
        b_z = load(p_z, mask, EVEN)
    return b_raw, b_dy, b_z


@Kernel
@triton.jit
def summarize_gradient_kernel(
    dt, rate, C, dy, bias, z, doc_ids, state,
    T, segment, dt_stride_b, dy_stride_b, z_stride_b,
    D: tl.constexpr, N: tl.constexpr, dt_stride_t: tl.constexpr, dy_stride_t: tl.constexpr,
    z_stride_t: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
    LOG_H: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The gradient that a segment's tokens send to the state that enters it.

    Grid: (blocks of D, S, B). Reads dt, dy, z and C once.
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    o_h = tl.arange(0, H)
    mask_d, mask_n = o_d < D, o_n < N
    o_dn, mask_dn = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
    first = i_s.to(tl.int64) * segment
    length = tl.minimum(segment, T - first).to(tl.int32)
    dt += i_b * dt_stride_b + first * dt_stride_t + o_h[None, :] * dt_stride_t + o_d[:, None]
    dy += i_b * dy_stride_b + first * dy_stride_t + o_h[None, :] * dy_stride_t + o_d[:, None]
    z += i_b * z_stride_b + first * z_stride_t + o_h[None, :] * z_stride_t + o_d[:, None]
    C += (i_b * T + first) * N + o_n
    doc_ids += i_b * T + first
    b_rate = load(rate + o_dn, mask_dn, EVEN)
    b_bias = load_bias(bias, o_d, mask_d, SOFTPLUS, EVEN)
    b_e = tl.zeros([BD, BN], dtype=tl.float32)
    last = (length - 1) // H * H
    mask = mask_d[:, None] & (last + o_h < length)[None, :]
    b_raw, b_dy, b_z = load_tiles(
        dt + last * dt_stride_t, dy + last * dy_stride_t, z + last * z_stride_t, mask, GATED, EVEN
    )
    for i_tile in range(last // H + 1):
        start = last - i_tile * H
        ahead = tl.maximum(start - H, 0)
        mask = mask_d[:, None] & (ahead + o_h < length)[None, :]
        b_next_raw, b_next_dy, b_next_z = load_tiles(
            dt + ahead * dt_stride_t, dy + ahead * dy_stride_t, z + ahead * z_stride_t, mask,
            GATED, EVEN,
        )  # fmt: skip
        mask = mask_d[:, None] & (start + o_h < length)[None, :]
        b_dt = time_steps(b_raw, b_bias, mask, SOFTPLUS, EVEN)
        b_pass = passing(b_dt, doc_ids, start + o_h, first, length, PACKED, EVEN)
        b_out = b_dy.to(tl.float32)
        if GATED:
            b_gate = b_z.to(tl.float32)
            b_out *= b_gate * tl.sigmoid(b_gate)
        b_steps = row_pairs(b_pass, b_out, BD, H, LOG_H)
        for i in tl.static_range(H - 1, -1, -1):
            b_C = load(C + (start + i) * N, mask_n & (start + i < length), EVEN)
            b_a = tl.exp2(b_steps[i][0][:, None] * b_rate)
            b_e = b_a * (b_e + b_steps[i][1][:, None] * b_C[None, :])
        b_raw, b_dy, b_z = b_next_raw, b_next_dy, b_next_z
    stretch = i_b * tl.num_programs(1) + i_s
    store(state + stretch * D * N + o_dn, b_e, mask_dn, EVEN)


@triton.jit
def add_channels(b_x, BD: tl.constexpr, BN: tl.constexpr):
    """[BN, BD / 2]: the sums over a thread's own two channels."""
    return tl.trans(tl.sum(tl.reshape(b_x, [2, BD // 2, BN]), axis=0))


@triton.jit
def load_all(p_x, p_dt, p_dy, p_z, mask, GATED: tl.constexpr, EVEN: tl.constexpr):
    b_raw, b_dy, b_z = load_tiles(p_dt, p_dy, p_z, mask, GATED, EVEN)
    return load(p_x, mask, EVEN), b_raw, b_dy, b_z


@Kernel
@triton.jit
def backward_kernel(
    x, dt, rate, B, C, bias, skip, z, dy, doc_ids, checkpoints, leaving,
    dx, ddt, dA, dB, dC, dbias, dskip, dz, y,
    T, segment, x_stride_b, dt_stride_b, z_stride_b, dy_stride_b,
    D: tl.constexpr, N: tl.constexpr, x_stride_t: tl.constexpr, dt_stride_t: tl.constexpr,
    z_stride_t: tl.constexpr, dy_stride_t: tl.constexpr,
    LN_2: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, LOG_N: tl.constexpr,
    LOG_D: tl.constexpr, H: tl.constexpr, LOG_H: tl.constexpr, SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr, Y: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment's tokens for the channels of one group.

    Grid: (groups of D, S, B); dA, dbias and dskip are written for each segment, dB and dC for each
    group. Reads x, dt, z, dy, B and C once and writes dx, ddt and dz once, with Y also y. From each
    checkpoint, 4 H tokens apart, three tiles are walked for the states before the tiles; then each
    tile, from the last, is walked for its H states, and back. Bound by the instructions it issues,
    some 240 a token and warp.
    """
    group, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(0)
    o_n, o_h = tl.arange(0, BN), tl.arange(0, H)
    mask_n = o_n < N
    first = i_s.to(tl.int64) * segment
    length = tl.minimum(segment, T - first).to(tl.int32)
    B += (i_b * T + first) * N + o_n
    C += (i_b * T + first) * N + o_n
    o_nh = o_h[None, :] * N + o_n[:, None]
    dB += ((i_b * groups + group) * T + first) * N + o_nh
    dC += ((i_b * groups + group) * T + first) * N + o_nh
    doc_ids += i_b * T + first
    checkpoints += (i_b * tl.cdiv(T, 4 * H) + first // (4 * H)) * D * BN
    stretch = i_b * tl.num_programs(1) + i_s
    x += i_b * x_stride_b + first * x_stride_t
    dt += i_b * dt_stride_b + first * dt_stride_t
    z += i_b * z_stride_b + first * z_stride_t
    dy += i_b * dy_stride_b + first * dy_stride_t
    dx += (i_b * T + first) * D
    ddt += (i_b * T + first) * D
    dz += (i_b * T + first) * D
    y += (i_b * T + first) * D
    blocks = tl.cdiv(length, 4 * H)
    for i_d in range(group, tl.cdiv(D, BD), groups):
        o_d = i_d * BD + tl.arange(0, BD)
        mask_d = o_d < D
        o_dn, mask_dn = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
        o_kept = checkpoint_offsets(o_d, o_n, D)
        p_x = x + o_h[None, :] * x_stride_t + o_d[:, None]
        p_dt = dt + o_h[None, :] * dt_stride_t + o_d[:, None]
        p_z = z + o_h[None, :] * z_stride_t + o_d[:, None]
        p_dy = dy + o_h[None, :] * dy_stride_t + o_d[:, None]
        o_out = o_h[None, :] * D + o_d[:, None]
        b_rate = load(rate + o_dn, mask_dn, EVEN)
        b_bias = load_bias(bias, o_d, mask_d, SOFTPLUS, EVEN)
        b_skip = load(skip + o_d, mask_d, EVEN)
        b_e = load(leaving + stretch * D * N + o_dn, mask_dn, EVEN)
        b_dA = tl.zeros([BD, BN], dtype=tl.float32)
        b_dbias = tl.zeros([BD, H], dtype=tl.float32)
        b_dskip = tl.zeros([BD, H], dtype=tl.float32)
        last = blocks * 4 * H - H
        b_next_x, b_next_raw, b_next_dy, b_next_z = load_all(
            p_x + last * x_stride_t, p_dt + last * dt_stride_t, p_dy + last * dy_stride_t,
            p_z + last * z_stride_t, mask_d[:, None] & (last + o_h < length)[None, :], GATED, EVEN,
        )  # fmt: skip
        for block in range(blocks):
            at = (blocks - 1 - block) * 4 * H
            b_kept = load(checkpoints + at // (4 * H) * D * BN + o_kept, mask_dn, EVEN)
            b_pairs = ()
            for i_tile in tl.static_range(3):
                start = at + i_tile * H
                mask = mask_d[:, None] & (start + o_h < length)[None, :]
                b_pairs += (load(p_x + start * x_stride_t, mask, EVEN),)
                b_pairs += (load(p_dt + start * dt_stride_t, mask, EVEN),)
            b_h = b_kept.to(tl.float32)
            b_before = (b_h,)
            for i_tile in tl.static_range(3):
                start = at + i_tile * H
                mask = mask_d[:, None] & (start + o_h < length)[None, :]
                b_dt = time_steps(b_pairs[2 * i_tile + 1], b_bias, mask, SOFTPLUS, EVEN)
                b_pass = passing(b_dt, doc_ids, start + o_h, first, length, PACKED, EVEN)
                b_added = b_dt * b_pairs[2 * i_tile].to(tl.float32)
                b_steps = row_pairs(b_pass, b_added, BD, H, LOG_H)
                for i in tl.static_range(H):
                    b_B = load(B + (start + i) * N, mask_n & (start + i < length), EVEN)
                    b_a = tl.exp2(b_steps[i][0][:, None] * b_rate)
                    b_h = b_a * b_h + b_steps[i][1][:, None] * b_B[None, :]
                b_before += (b_h,)
            b_0, b_1, b_2, b_3 = b_before[0], b_before[1], b_before[2], b_before[3]  # type: ignore[misc]

            for i_tile in range(4):
                start = at + (3 - i_tile) * H
                ahead = tl.maximum(start - H, 0)
                mask = mask_d[:, None] & (start + o_h < length)[None, :]
                mask_nh = mask_n[:, None] & (start + o_h < length)[None, :]
                b_x, b_raw, b_dy, b_z = b_next_x, b_next_raw, b_next_dy, b_next_z
                b_input = b_x.to(tl.float32)
                b_next_x, b_next_raw, b_next_dy, b_next_z = load_all(
                    p_x + ahead * x_stride_t, p_dt + ahead * dt_stride_t,
                    p_dy + ahead * dy_stride_t, p_z + ahead * z_stride_t,
                    mask_d[:, None] & (ahead + o_h < length)[None, :], GATED, EVEN,
                )  # fmt: skip
                b_dB, b_dC = tl.zeros([BN, H], tl.float32), tl.zeros([BN, H], tl.float32)
                if i_d > group:
                    b_dB = load(dB + start * N, mask_nh, EVEN)
                    b_dC = load(dC + start * N, mask_nh, EVEN)
                b_out, b_gate = b_dy.to(tl.float32), b_z.to(tl.float32)
                b_dt = time_steps(b_raw, b_bias, mask, SOFTPLUS, EVEN)
                b_pass = passing(b_dt, doc_ids, start + o_h, first, length, PACKED, EVEN)
                if GATED:
                    b_open = tl.sigmoid(b_gate)
                    b_out *= b_gate * b_open
                b_steps = row_pairs(b_pass, b_dt * b_input, BD, H, LOG_H)
                b_outs = rows(b_out, BD, H, LOG_H)
                b_h = b_3
                b_states = (b_h,)
                for i in tl.static_range(H):
                    b_B = load(B + (start + i) * N, mask_n & (start + i < length), EVEN)
                    b_a = tl.exp2(b_steps[i][0][:, None] * b_rate)
                    b_h = b_a * b_h + b_steps[i][1][:, None] * b_B[None, :]
                    b_states += (b_h,)
                b_gBs, b_qs, b_dBs, b_dCs, b_ys = (), (), (), (), ()
                for i in tl.static_range(H - 1, -1, -1):
                    mask_i = mask_n & (start + i < length)
                    b_B = load(B + (start + i) * N, mask_i, EVEN)
                    b_C = load(C + (start + i) * N, mask_i, EVEN)
                    b_step, b_o = b_steps[i][0][:, None], b_outs[i][:, None]
                    b_dCs = (add_channels(b_o * b_states[i + 1], BD, BN),) + b_dCs
                    if GATED or Y:
                        b_ys = (add_numbers(b_states[i + 1] * b_C[None, :], BD, BN),) + b_ys
                    b_g = b_e + b_o * b_C[None, :]
                    b_e = tl.exp2(b_step * b_rate) * b_g
                    b_through = b_e * b_states[i]
                    b_dA += b_step * b_through
                    b_gBs = (add_numbers(b_g * b_B[None, :], BD, BN),) + b_gBs
                    b_qs = (add_numbers(b_through * b_rate, BD, BN),) + b_qs
                    b_dBs = (add_channels(b_steps[i][1][:, None] * b_g, BD, BN),) + b_dBs

                b_gB = add_lanes(b_gBs, BD, BN // 4, LOG_N, H, LOG_H)
                b_q = add_lanes(b_qs, BD, BN // 4, LOG_N, H, LOG_H)
                b_dstep = b_input * b_gB + b_q * LN_2
                if SOFTPLUS:
                    b_dstep *= tl.sigmoid(b_raw.to(tl.float32) + b_bias[:, None])
                    if not EVEN:
                        b_dstep = tl.where(mask, b_dstep, 0.0)
                    b_dbias += b_dstep
                b_dskip += b_out * b_input
                store(dx + start * D + o_out, b_dt * b_gB + b_skip[:, None] * b_out, mask, EVEN)
                store(ddt + start * D + o_out, b_dstep, mask, EVEN)
                if GATED or Y:
                    b_y = add_lanes(b_ys, BD, BN // 4, LOG_N, H, LOG_H) + b_skip[:, None] * b_input
                    if GATED:
                        b_slope = b_open * (1.0 + b_gate * (1.0 - b_open))
                        b_dz = b_dy.to(tl.float32) * b_y * b_slope
                        store(dz + start * D + o_out, b_dz, mask, EVEN)
                        b_y *= b_gate * b_open
                    if Y:
                        store(y + start * D + o_out, b_y, mask, EVEN)
                b_dB += add_lanes(b_dBs, BN, BD // 2, LOG_D, H, LOG_H)
                b_dC += add_lanes(b_dCs, BN, BD // 2, LOG_D, H, LOG_H)
                store(dB + start * N, b_dB, mask_nh, EVEN)
                store(dC + start * N, b_dC, mask_nh, EVEN)
                b_3, b_2, b_1 = b_2, b_1, b_0
        store(dA + stretch * D * N + o_dn, b_dA, mask_dn, EVEN)
        store(dskip + stretch * D + o_d, tl.sum(b_dskip, axis=1), mask_d, EVEN)
        if SOFTPLUS:
            store(dbias + stretch * D + o_d, tl.sum(b_dbias, axis=1), mask_d, EVEN)


@torch.library.custom_op("fla_dist::selective_scan_summarize_gradient", mutates_args=())
def summarize_gradient(
    dt: Tensor, rate: Tensor, C: Tensor, dy: Tensor, bias: Tensor | None, z: Tensor | None,
    doc_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient that each segment's tokens send to its entering state, [B, S, D, N]."""
    batch, length, channels = dy.shape
    count, size = segments(length), rate.shape[1]
    state = rate.new_empty(batch, count, channels, size)
    gate = dy if z is None else z
    summarize_gradient_kernel[(triton.cdiv(channels, block_size(size)), count, batch)](
        dt, rate, C, dy, rate if bias is None else bias, gate,
        rate if doc_ids is None else doc_ids, state,
        length, forward.SEGMENT, dt.stride(0), dy.stride(0), gate.stride(0),
        D=channels, N=size, dt_stride_t=dt.stride(1), dy_stride_t=dy.stride(1),
        z_stride_t=gate.stride(1), BD=block_size(size), BN=padded(size), H=forward.TILE,
        LOG_H=log2(forward.TILE), SOFTPLUS=bias is not None, GATED=z is not None,
        PACKED=doc_ids is not None, EVEN=even(dy, size), num_warps=forward.WARPS,
    )  # fmt: skip
    return state


@summarize_gradient.register_fake
def _(dt, rate, C, dy, bias, z, doc_ids):
    return rate.new_empty(dy.shape[0], segments(dy.shape[1]), dy.shape[2], rate.shape[1])


@torch.library.custom_op("fla_dist::selective_scan_backward", mutates_args=())
def backward(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, skip: Tensor,
    z: Tensor | None, dy: Tensor, doc_ids: Tensor | None, checkpoints: Tensor, leaving: Tensor,
    with_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, the bias, D and z (unwritten where there is no bias, empty where
    there is no gate), and y (empty unless `with_y`), from `leaving` [B, S, D, N], what each
    segment's successors send to the state that leaves it."""
    batch, length, channels = x.shape
    size, count = rate.shape[1], leaving.shape[1]
    groups = min(max(1, PROGRAMS // (batch * count)), triton.cdiv(channels, block_size(size)))
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    y = x.new_empty(x.shape if with_y else 0)
    gate = x if z is None else z
    dA = torch.empty_like(leaving)
    dB, dC = rate.new_empty(2, batch, groups, length, size)
    dbias, dskip = rate.new_empty(2, batch, count, channels)
    backward_kernel[(groups, count, batch)](
        x, dt, rate, B, C, rate if bias is None else bias, skip, gate, dy,
        rate if doc_ids is None else doc_ids, checkpoints, leaving,
        dx, ddt, dA, dB, dC, dbias, dskip, dz, y,
        length, forward.SEGMENT, x.stride(0), dt.stride(0), gate.stride(0), dy.stride(0),
        D=channels, N=size, x_stride_t=x.stride(1), dt_stride_t=dt.stride(1),
        z_stride_t=gate.stride(1), dy_stride_t=dy.stride(1),
        LN_2=1 / LOG2_E, BD=block_size(size), BN=padded(size), LOG_N=log2(padded(size) // 4),
        LOG_D=log2(block_size(size) // 2), H=TILE, LOG_H=log2(TILE), SOFTPLUS=bias is not None,
        GATED=z is not None, Y=with_y, PACKED=doc_ids is not None, EVEN=even(x, size),
        num_warps=forward.WARPS,
    )  # fmt: skip
    return (
        dx, ddt, dA.sum(dim=(0, 1)), dB.sum(dim=1), dC.sum(dim=1), dbias.sum(dim=(0, 1)),
        dskip.sum(dim=(0, 1)), dz, y,
    )  # fmt: skip


@backward.register_fake
def _(x, dt, rate, B, C, bias, skip, z, dy, doc_ids, checkpoints, leaving, with_y):
    return (
        x.new_empty(x.shape), dt.new_empty(dt.shape), torch.empty_like(rate),
        torch.empty_like(B), torch.empty_like(C), torch.empty_like(skip), torch.empty_like(skip),
        x.new_empty(0) if z is None else z.new_empty(z.shape),
        x.new_empty(x.shape if with_y else 0),
    )  # fmt: skip
