"""HGRN in Triton, forward and backward, one launch each.

Notation: B batch, T tokens, D channels; S segments of R rows of L tokens; x, g, h (the output) and
their gradients are [B, T, D], states fp32 [B, D]. `b_*` are blocks in registers, `o_*` offsets.

A program owns BD channels of a segment: a row a warp, channels across lanes. It reads the segment
once to learn the map from the state that enters it to the state that leaves it, (Σ g, state from
zero); waits for the state that enters; and reads the segment again to write its output. Segments
are short, so that what all running programs have read is still in the L2 then.

How the entering state comes: GROUP segments in a row are a group. Each program publishes its
segment's map. It composes the maps of the group's members before it, and applies them to the state
that enters the group, which the last member of the group before publishes. So a sequence costs one
wait a group, and every sum has one order, whatever the timing: the same bits every time. Programs
start in the order of their index, so those that are waited for are running or done.

The backward is the same in reverse, with e_t = exp(g_t) (dh_t + e_{t+1}) for the state.
"""

# Tuples of blocks grow while their loops are unrolled.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from fla_dist.kernels.common.launch import Kernel
from fla_dist.kernels.common.segments import LOG2_E

KEEP: tl.constexpr = tl.constexpr("evict_last")
DROP: tl.constexpr = tl.constexpr("evict_first")
"""The cache's policy for what is read again soon, and for what is not."""


@triton.jit
def input_weight(b_g, b_decay):
    """1 - exp g, by its series where the difference would cancel."""
    b_series = 1 + b_g * (1 / 2 + b_g * (1 / 6 + b_g * (1 / 24 + b_g / 120)))
    return tl.where(b_g > -0.125, -b_g * b_series, 1 - b_decay)


@triton.jit
def compose(log_1, state_1, log_2, state_2):
    """First map 1, then map 2; logs to base 2."""
    return log_1 + log_2, tl.exp2(log_2) * state_1 + state_2


@triton.jit
def join_rows(b_log, b_state, R: tl.constexpr):
    """Row r holds the map of the row before it in the walk (row 0 that of the last).

    Returns: the map from the segment's entry to each row's, [R, BD], and the whole segment's, [BD].
    """
    o_r = tl.arange(0, R)[:, None]
    b_own_log = tl.sum(tl.where(o_r == 0, b_log, 0.0), axis=0)
    b_own_state = tl.sum(tl.where(o_r == 0, b_state, 0.0), axis=0)
    b_log, b_state = tl.associative_scan(
        (tl.where(o_r == 0, 0.0, b_log), tl.where(o_r == 0, 0.0, b_state)), 0, compose
    )
    b_last_log = tl.sum(tl.where(o_r == R - 1, b_log, 0.0), axis=0)
    b_last_state = tl.sum(tl.where(o_r == R - 1, b_state, 0.0), axis=0)
    b_total_log, b_total_state = compose(b_last_log, b_last_state, b_own_log, b_own_state)
    return b_log, b_state, b_total_log, b_total_state


@triton.jit
def wait_for(word, bits):
    """Returns `word` when all of `bits` are set in it."""
    seen = tl.atomic_or(word, 0, sem="acquire")
    while (seen & bits) != bits:
        seen = tl.atomic_or(word, 0, sem="acquire")
    return seen


@triton.jit
def entering_state(
    b_log, b_state, initial, final, joining, arrived, o_d, mask_d,
    D: tl.constexpr, HAS_INITIAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """[BD], the state that enters this program's segment, whose map is (b_log, b_state).

    Segments are counted in the order of the walk, tl.program_id(1). joining: [B, 2 S + groups, D],
    the segments' maps and the states that enter the groups.  arrived: int32 [B, groups, blocks of
    D]: bit u is set when member u's map is there, bit GROUP when the carried state is.
    """
    index, count = tl.program_id(1), tl.num_programs(1)
    group, member = index // GROUP, index % GROUP
    groups, batch = tl.cdiv(count, GROUP), tl.program_id(2).to(tl.int64)
    at_group = batch * groups + group
    word = arrived + at_group * tl.num_programs(0) + tl.program_id(0)
    joining += batch * (2 * count + groups) * D + o_d
    p_map, p_carried = joining + index * 2 * D, joining + (2 * count + group) * D
    tl.store(p_map, b_log, mask=mask_d)
    tl.store(p_map + D, b_state, mask=mask_d)
    tl.debug_barrier()
    tl.atomic_or(word, 1 << member, sem="release")

    seen = wait_for(word, (1 << member) - 1)
    b_before_log = tl.zeros(b_log.shape, dtype=tl.float32)
    b_before_state = tl.zeros(b_log.shape, dtype=tl.float32)
    for u in tl.static_range(GROUP - 1):
        p_other = p_map + (u - member) * 2 * D
        inside = mask_d & (u < member)
        b_other_log = tl.load(p_other, mask=inside, other=0.0)
        b_other_state = tl.load(p_other + D, mask=inside, other=0.0)
        b_before_log, b_before_state = compose(
            b_before_log, b_before_state, b_other_log, b_other_state
        )

    b_carried = tl.zeros(b_log.shape, dtype=tl.float32)
    if group == 0:
        if HAS_INITIAL:
            b_carried += tl.load(initial + batch * D + o_d, mask=mask_d, other=0.0)
    else:
        if (seen & (1 << GROUP)) == 0:
            wait_for(word, 1 << GROUP)
        b_carried += tl.load(p_carried, mask=mask_d, other=0.0)
    b_entering = tl.exp2(b_before_log) * b_carried + b_before_state
    b_leaving = tl.exp2(b_log) * b_entering + b_state
    if index == count - 1:
        tl.store(final + batch * D + o_d, b_leaving, mask=mask_d)
    elif member == GROUP - 1:
        tl.store(p_carried + D, b_leaving, mask=mask_d)
        tl.debug_barrier()
        tl.atomic_or(word + tl.num_programs(0), 1 << GROUP, sem="release")
    return b_entering


@triton.jit
def load_tokens(
    x, stride: tl.constexpr, o_token, valid, mask_d,
    STEP: tl.constexpr, U: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """U tokens of each row, [R, BD] each, from o_token on; STEP is -1 for the walk in reverse."""
    x += o_token * stride
    b = ()
    for u in tl.static_range(U):
        mask = ((o_token + u * STEP < valid) & mask_d[None, :]) | EVEN
        b += (tl.load(x + u * STEP * stride, mask=mask, other=0.0, eviction_policy=POLICY),)
    return b


@triton.jit
def store(p, b, mask):
    tl.store(p, b.to(p.dtype.element_ty), mask=mask, eviction_policy=DROP)


@triton.jit
def starts_document(starts, o_token, valid, EVEN: tl.constexpr):
    """[R, 1]."""
    return tl.load(starts + o_token, mask=(o_token < valid) | EVEN, other=0) != 0


@Kernel
@triton.jit
def forward_kernel(
    x, g, starts, initial, h, final, joining, arrived,
    T, x_stride_b, g_stride_b,
    D: tl.constexpr, x_stride_t: tl.constexpr, g_stride_t: tl.constexpr, RESET: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, WRITE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """h_t = exp(g_t) h_{t-1} + (1 - exp g_t) x_t; without WRITE the final state only.

    Grid: (blocks of D, S, B). Reads x and g, writes h: bound by memory.
    """
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * (R * L)
    o_r = tl.arange(0, R)[:, None]
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d, valid = (o_d < D) | EVEN, tl.minimum(T - first, R * L).to(tl.int32)
    x += batch * x_stride_b + first * x_stride_t + o_d[None, :]
    g += batch * g_stride_b + first * g_stride_t + o_d[None, :]
    starts += batch * T + first

    b_h, b_log = tl.zeros([R, BD], dtype=tl.float32), tl.zeros([R, BD], dtype=tl.float32)
    o_token = (o_r + R - 1) % R * L
    for _ in range(0, L, U):
        b_x = load_tokens(x, x_stride_t, o_token, valid, mask_d, 1, U, EVEN, KEEP)
        b_g = load_tokens(g, g_stride_t, o_token, valid, mask_d, 1, U, EVEN, KEEP)
        for u in tl.static_range(U):
            b_log_decay = b_g[u].to(tl.float32)
            b_decay = tl.exp2(b_log_decay * LOG2_E)
            b_input = input_weight(b_log_decay, b_decay) * b_x[u].to(tl.float32)
            b_log_decay *= LOG2_E
            if PACKED:
                b_starts = starts_document(starts, o_token + u, valid, EVEN)
                b_decay = tl.where(b_starts, 0.0, b_decay)
                b_log_decay = tl.where(b_starts, RESET, b_log_decay)
            b_h = b_decay * b_h + b_input
            b_log += b_log_decay
        o_token += U
    b_log, b_h, b_total_log, b_total = join_rows(b_log, b_h, R)
    b_entering = entering_state(
        b_total_log, b_total, initial, final, joining, arrived, o_d, mask_d,
        D, HAS_INITIAL, GROUP,
    )  # fmt: skip

    if WRITE:
        h += batch * T * D + first * D + o_d[None, :]
        b_h = tl.exp2(b_log) * b_entering[None, :] + b_h
        o_token = o_r * L
        for _ in range(0, L, U):
            b_x = load_tokens(x, x_stride_t, o_token, valid, mask_d, 1, U, EVEN, DROP)
            b_g = load_tokens(g, g_stride_t, o_token, valid, mask_d, 1, U, EVEN, DROP)
            for u in tl.static_range(U):
                b_log_decay = b_g[u].to(tl.float32)
                b_decay = tl.exp2(b_log_decay * LOG2_E)
                b_input = input_weight(b_log_decay, b_decay) * b_x[u].to(tl.float32)
                if PACKED:
                    b_starts = starts_document(starts, o_token + u, valid, EVEN)
                    b_decay = tl.where(b_starts, 0.0, b_decay)
                b_h = b_decay * b_h + b_input
                mask = ((o_token + u < valid) & mask_d[None, :]) | EVEN
                store(h + (o_token + u) * D, b_h, mask)
            o_token += U


@Kernel
@triton.jit
def backward_kernel(
    x, g, h, dh, starts, initial, final_gradient, dx, dg, initial_gradient, joining, arrived,
    T, x_stride_b, g_stride_b, dh_stride_b,
    D: tl.constexpr, x_stride_t: tl.constexpr, g_stride_t: tl.constexpr, dh_stride_t: tl.constexpr,
    RESET: tl.constexpr, R: tl.constexpr, L: tl.constexpr, U: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr,
    WRITE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dx_t = (1 - exp g_t) s_t and dg_t = exp(g_t) s_t (h_{t-1} - x_t) with s_t = dh_t + e_{t+1}
    and e_t = exp(g_t) s_t; without WRITE e_0, the initial state's gradient, only.

    Grid: (blocks of D, S, B), from the last segment to the first. Reads x, g, h and dh, writes dx
    and dg: bound by memory.
    """
    batch = tl.program_id(2).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64) * (R * L)
    o_r = tl.arange(0, R)[:, None]
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d, valid = (o_d < D) | EVEN, tl.minimum(T - first, R * L).to(tl.int32)
    g += batch * g_stride_b + first * g_stride_t + o_d[None, :]
    dh += batch * dh_stride_b + first * dh_stride_t + o_d[None, :]
    starts += batch * T + first

    b_e, b_log = tl.zeros([R, BD], dtype=tl.float32), tl.zeros([R, BD], dtype=tl.float32)
    o_token = R * L - 1 - (o_r + R - 1) % R * L
    for _ in range(0, L, U):
        b_dh = load_tokens(dh, dh_stride_t, o_token, valid, mask_d, -1, U, EVEN, KEEP)
        b_g = load_tokens(g, g_stride_t, o_token, valid, mask_d, -1, U, EVEN, KEEP)
        for u in tl.static_range(U):
            b_log_decay = b_g[u].to(tl.float32) * LOG2_E
            if PACKED:
                b_starts = starts_document(starts, o_token - u, valid, EVEN)
                b_log_decay = tl.where(b_starts, RESET, b_log_decay)
            b_e = tl.exp2(b_log_decay) * (b_e + b_dh[u].to(tl.float32))
            b_log += b_log_decay
        o_token -= U
    b_log, b_e, b_total_log, b_total = join_rows(b_log, b_e, R)
    b_entering = entering_state(
        b_total_log, b_total, final_gradient, initial_gradient, joining, arrived, o_d, mask_d,
        D, HAS_FINAL, GROUP,
    )  # fmt: skip

    if WRITE:
        x += batch * x_stride_b + first * x_stride_t + o_d[None, :]
        o_rows = batch * T * D + first * D + o_d[None, :]
        h += o_rows
        dx += o_rows
        dg += o_rows
        b_initial = tl.zeros([BD], dtype=tl.float32)
        if HAS_INITIAL:
            b_initial += tl.load(initial + batch * D + o_d, mask=mask_d, other=0.0)
        b_e = tl.exp2(b_log) * b_entering[None, :] + b_e
        o_token = R * L - 1 - o_r * L
        for _ in range(0, L, U):
            b_dh = load_tokens(dh, dh_stride_t, o_token, valid, mask_d, -1, U, EVEN, DROP)
            b_g = load_tokens(g, g_stride_t, o_token, valid, mask_d, -1, U, EVEN, DROP)
            b_x = load_tokens(x, x_stride_t, o_token, valid, mask_d, -1, U, EVEN, DROP)
            b_h = ()
            for u in tl.static_range(U):
                inside = (o_token - u < valid) & (first + o_token - u > 0) & mask_d[None, :]
                b_h += (tl.load(h + (o_token - u - 1) * D, mask=inside, other=0.0),)
            for u in tl.static_range(U):
                b_log_decay = b_g[u].to(tl.float32)
                b_decay = tl.exp2(b_log_decay * LOG2_E)
                b_s = b_dh[u].to(tl.float32) + b_e
                b_before = b_h[u].to(tl.float32)
                if HAS_INITIAL:
                    b_before = tl.where(first + o_token == u, b_initial[None, :], b_before)
                b_e = b_decay * b_s
                if PACKED:
                    b_starts = starts_document(starts, o_token - u, valid, EVEN)
                    b_before = tl.where(b_starts, 0.0, b_before)
                b_dx = input_weight(b_log_decay, b_decay) * b_s
                b_dg = b_e * (b_before - b_x[u].to(tl.float32))
                mask = ((o_token - u < valid) & mask_d[None, :]) | EVEN
                store(dx + (o_token - u) * D, b_dx, mask)
                store(dg + (o_token - u) * D, b_dg, mask)
                if PACKED:
                    b_e = tl.where(b_starts, 0.0, b_e)
            o_token -= U
