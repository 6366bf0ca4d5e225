"""The selective scan's backward in Triton; notation and layout as in triton_forward.py.

With a_t = exp(Δ_t A), u_t = Δ_t x_t, and e_t the gradient that the tokens after t send to h_t:

    g_t = e_t + dy_t C_t        e_{t-1} = a_t ⊙ g_t
    dC_t = Σ_D dy_t h_t         dB_t = Σ_D u_t g_t           dA = Σ_T Δ_t e_{t-1} ⊙ h_{t-1}
    dx_t = Δ_t g_t · B_t        dΔ_t = x_t g_t · B_t + A · (e_{t-1} ⊙ h_{t-1})

States are recomputed between checkpoints, in order, and walked back. h_{t-1} is what was
recomputed, never (h_t - u_t B_t) / a_t, which a strong decay would turn into noise.
"""

# Tuples of blocks grow while their loops are unrolled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.mamba import triton_forward as forward
from fla_dist.kernels.mamba.triton_forward import (
    LOG2_E,
    block_size,
    checkpoint_offsets,
    decay,
    even,
    load_channels,
    load_states,
    padded,
    segments,
)

HISTORY = 8
"""States a program holds at once; between two checkpoints it recomputes from the first of them."""
GROUPS = 32
"""Programs that share the channels of a segment. Each walks its blocks of channels one after the
other and adds their dB and dC up in memory of its own: no atomics, and 32 partial sums, not 256."""


@triton.jit
def summarize_gradient_kernel(
    dt, rate, C, dy, reset, state,
    T, segment, dt_stride_b, dy_stride_b,
    D: tl.constexpr, N: tl.constexpr, dt_stride_t: tl.constexpr, dy_stride_t: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr, PACKED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The gradient that a segment's tokens send to the state that enters it.

    Grid: (blocks of D, S, B). Reads dt, dy and C once.
    """
    i_s, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d, mask_n = (o_d < D) | EVEN, (o_n < N) | EVEN
    o_dn, mask = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
    dt += i_b * dt_stride_b + o_d
    dy += i_b * dy_stride_b + o_d
    C += i_b * T * N + o_n
    reset += i_b * T
    b_rate = tl.load(rate + o_dn, mask=mask, other=0.0)
    b_e = tl.zeros([BD, BN], dtype=tl.float32)
    first = i_s.to(tl.int64) * segment
    blocks = tl.cdiv(tl.minimum(segment, T - first), UNROLL)
    for block in range(blocks):
        last = first + (blocks - block) * UNROLL - 1
        p_dt, p_dy = dt + last * dt_stride_t, dy + last * dy_stride_t
        p_C, p_reset = C + last * N, reset + last
        b_dt, b_dy, b_C = (), (), ()
        for i in tl.static_range(UNROLL):
            inside = (last - i < T) | EVEN
            b_dt += (load_channels(p_dt - i * dt_stride_t, mask_d & inside),)
            b_dy += (load_channels(p_dy - i * dy_stride_t, mask_d & inside),)
            b_C += (load_states(p_C - i * N, mask_n & inside),)
        for i in tl.static_range(UNROLL):
            inside = (last - i < T) | EVEN
            b_a = decay(b_dt[i], b_rate, p_reset - i, inside, PACKED)
            b_e = b_a * (b_e + b_dy[i] * b_C[i])
    tl.store(state + (i_b * tl.num_programs(1) + i_s) * D * N + o_dn, b_e, mask=mask)


@triton.jit
def backward_kernel(
    x, dt, rate, B, C, dy, reset, checkpoints, leaving, dx, ddt, dA, dB, dC,
    T, segment, x_stride_b, dt_stride_b, dy_stride_b,
    D: tl.constexpr, N: tl.constexpr, x_stride_t: tl.constexpr, dt_stride_t: tl.constexpr,
    dy_stride_t: tl.constexpr,
    LN_2: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment's tokens for the channels of one group; H states held at once.

    Grid: (groups of D, S, B); dA is written for each segment, dB and dC for each group. Reads x,
    dt, B (1 + H / L times) and dy, C once, writes dx and ddt once. A token's results are gathered
    in tiles of H tokens, [H, BN] and [BD, H], and stored once every H tokens: a store between two
    tokens would keep the next one's loads from being early. Should be bound by the instructions it
    issues, some 260 a token and warp (2.4 ms at 32k tokens of 4096 channels); waits for memory
    double that.
    """
    group, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(0)
    o_n, o_h = tl.arange(0, BN), tl.arange(0, H)
    mask_n = (o_n < N) | EVEN
    x += i_b * x_stride_b
    dt += i_b * dt_stride_b
    dy += i_b * dy_stride_b
    dx += i_b * T * D
    ddt += i_b * T * D
    B += i_b * T * N + o_n
    C += i_b * T * N + o_n
    dB += (i_b * groups + group) * T * N
    dC += (i_b * groups + group) * T * N
    reset += i_b * T
    checkpoints += i_b * tl.cdiv(T, L) * D * BN
    stretch = i_b * tl.num_programs(1) + i_s
    first = i_s.to(tl.int64) * segment
    blocks = tl.cdiv(tl.minimum(segment, T - first), H)
    for i_d in range(group, tl.cdiv(D, BD), groups):
        adds = i_d > group
        o_d = i_d * BD + tl.arange(0, BD)
        mask_d = (o_d < D) | EVEN
        o_dn, mask = o_d[:, None] * N + o_n[None, :], mask_d[:, None] & mask_n[None, :]
        b_rate = tl.load(rate + o_dn, mask=mask, other=0.0)
        b_e = tl.load(leaving + stretch * D * N + o_dn, mask=mask, other=0.0)
        b_dA = tl.zeros([BD, BN], dtype=tl.float32)
        for block in range(blocks):
            start = first + (blocks - 1 - block) * H
            kept = start // L * L
            p_checkpoint = checkpoints + (kept // L) * D * BN + checkpoint_offsets(o_d, o_n, D)
            b_h = tl.load(p_checkpoint, mask=mask, other=0.0).to(tl.float32)
            p_x, p_dt = x + start * x_stride_t + o_d, dt + start * dt_stride_t + o_d
            p_dy, p_reset = dy + start * dy_stride_t + o_d, reset + start
            p_B, p_C = B + start * N, C + start * N
            b_x, b_dt, b_dy = (), (), ()
            for i in tl.static_range(H):
                mask_i = mask_d & ((start + i < T) | EVEN)
                b_x += (tl.load(p_x + i * x_stride_t, mask=mask_i, other=0.0),)
                b_dt += (tl.load(p_dt + i * dt_stride_t, mask=mask_i, other=0.0),)
                b_dy += (tl.load(p_dy + i * dy_stride_t, mask=mask_i, other=0.0),)
            inside_h = (start + o_h < T) | EVEN
            mask_hn = inside_h[:, None] & mask_n[None, :]
            mask_dh = mask_d[:, None] & inside_h[None, :]
            o_hn = start * N + o_h[:, None] * N + o_n[None, :]
            b_dB = tl.load(dB + o_hn, mask=mask_hn & adds, other=0.0)
            b_dC = tl.load(dC + o_hn, mask=mask_hn & adds, other=0.0)
            b_dx, b_ddt = tl.zeros([BD, H], tl.float32), tl.zeros([BD, H], tl.float32)

            for before in range(kept, start, H):
                p_u, p_step = x + before * x_stride_t + o_d, dt + before * dt_stride_t + o_d
                for i in tl.static_range(H):
                    b_step = load_channels(p_step + i * dt_stride_t, mask_d)
                    b_u = b_step * load_channels(p_u + i * x_stride_t, mask_d)
                    b_a = decay(b_step, b_rate, reset + before + i, True, PACKED)
                    b_h = b_a * b_h + b_u * load_states(B + (before + i) * N, mask_n)
            b_states = (b_h,)
            for i in tl.static_range(H):
                inside = (start + i < T) | EVEN
                b_step = b_dt[i].to(tl.float32)[:, None]
                b_u = b_step * b_x[i].to(tl.float32)[:, None]
                b_a = decay(b_step, b_rate, p_reset + i, inside, PACKED)
                b_h = b_a * b_h + b_u * load_states(p_B + i * N, mask_n & inside)
                b_states += (b_h,)

            for j in tl.static_range(1, H + 1):
                inside = (start + H - j < T) | EVEN
                b_step = b_dt[H - j].to(tl.float32)[:, None]
                b_input = b_x[H - j].to(tl.float32)[:, None]
                b_out = b_dy[H - j].to(tl.float32)[:, None]
                b_g = b_e + b_out * load_states(p_C + (H - j) * N, mask_n & inside)
                b_e = decay(b_step, b_rate, p_reset + (H - j), inside, PACKED) * b_g
                b_through = b_e * b_states[H - j]
                b_dA += b_step * b_through
                b_gB = b_g * load_states(p_B + (H - j) * N, mask_n & inside)
                b_gB = tl.sum(b_gB, axis=1)[:, None]
                b_Aq = tl.sum(b_through * b_rate, axis=1)[:, None] * LN_2
                b_dC_j = tl.sum(b_out * b_states[H - j + 1], axis=0)[None, :]
                b_dB_j = tl.sum((b_step * b_input) * b_g, axis=0)[None, :]
                at_j = o_h == H - j
                b_dC += tl.where(at_j[:, None], b_dC_j, 0.0)
                b_dB += tl.where(at_j[:, None], b_dB_j, 0.0)
                b_dx = tl.where(at_j[None, :], b_step * b_gB, b_dx)
                b_ddt = tl.where(at_j[None, :], b_input * b_gB + b_Aq, b_ddt)

            tl.store(dB + o_hn, b_dB, mask=mask_hn)
            tl.store(dC + o_hn, b_dC, mask=mask_hn)
            o_dh = start * D + o_h[None, :] * D + o_d[:, None]
            tl.store(dx + o_dh, b_dx.to(dx.dtype.element_ty), mask=mask_dh)
            tl.store(ddt + o_dh, b_ddt.to(ddt.dtype.element_ty), mask=mask_dh)
        tl.store(dA + stretch * D * N + o_dn, b_dA, mask=mask)


@torch.library.custom_op("fla_dist::selective_scan_summarize_gradient", mutates_args=())
def summarize_gradient(
    dt: Tensor, rate: Tensor, C: Tensor, dy: Tensor, reset: Tensor | None
) -> Tensor:
    """The gradient that each segment's tokens send to its entering state, [B, S, D, N]."""
    batch, length, channels = dy.shape
    count, size = segments(length), rate.shape[1]
    state = rate.new_empty(batch, count, channels, size)
    summarize_gradient_kernel[(triton.cdiv(channels, block_size(size)), count, batch)](
        dt, rate, C, dy, rate if reset is None else reset, state,
        length, forward.SEGMENT, dt.stride(0), dy.stride(0),
        D=channels, N=size, dt_stride_t=dt.stride(1), dy_stride_t=dy.stride(1),
        BD=block_size(size), BN=padded(size), UNROLL=forward.UNROLL, PACKED=reset is not None,
        EVEN=even(dy, size), num_warps=forward.WARPS,
    )  # fmt: skip
    return state


@summarize_gradient.register_fake
def _(dt, rate, C, dy, reset):
    return rate.new_empty(dy.shape[0], segments(dy.shape[1]), dy.shape[2], rate.shape[1])


@torch.library.custom_op("fla_dist::selective_scan_backward", mutates_args=())
def backward(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, dy: Tensor, reset: Tensor | None,
    checkpoints: Tensor, leaving: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, from `leaving` [B, S, D, N], what each segment's successors send
    to the state that leaves it."""
    batch, length, channels = x.shape
    size = rate.shape[1]
    groups = min(GROUPS, triton.cdiv(channels, block_size(size)))
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA = torch.empty_like(leaving)
    dB, dC = rate.new_empty(2, batch, groups, length, size)
    backward_kernel[(groups, leaving.shape[1], batch)](
        x, dt, rate, B, C, dy, rate if reset is None else reset, checkpoints, leaving,
        dx, ddt, dA, dB, dC,
        length, forward.SEGMENT, x.stride(0), dt.stride(0), dy.stride(0),
        D=channels, N=size, x_stride_t=x.stride(1), dt_stride_t=dt.stride(1),
        dy_stride_t=dy.stride(1),
        LN_2=1 / LOG2_E, BD=block_size(size), BN=padded(size), L=forward.CHECKPOINT, H=HISTORY,
        PACKED=reset is not None, EVEN=even(x, size), num_warps=forward.WARPS,
    )  # fmt: skip
    return dx, ddt, dA.sum(dim=(0, 1)), dB.sum(dim=1), dC.sum(dim=1)


@backward.register_fake
def _(x, dt, rate, B, C, dy, reset, checkpoints, leaving):
    return (
        x.new_empty(x.shape), dt.new_empty(dt.shape), torch.empty_like(rate),
        torch.empty_like(B), torch.empty_like(C),
    )  # fmt: skip
