"""Mamba's selective scan in plain PyTorch (arXiv:2312.00752): the truth, and the CPU backend.

x, dt, z: [B, T, D].  A: [D, N], negative.  B, C: [B, T, N].  dt_bias, D: [D].  States: [B, D, N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.common.precision import without_autocast
from fla_dist.kernels.state import LOCAL, RESET, Diagonal, JoinedStates, Scan


def time_steps(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    return dt if dt_bias is None else F.softplus(dt + dt_bias)


def gated(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """What follows the state: the channels' own inputs, and the gate."""
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def selective_scan_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token: equation 2 with the decay of equation 4 (Euler for B)."""
    batch, length, channels = x.shape
    dt = time_steps(dt, dt_bias)
    state = x.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0)
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[
            :, t, None
        ]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return gated(torch.stack(outputs, dim=1), x, D, z), state


@without_autocast
def selective_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """All chunks walk their tokens side by side from a zero state; what enters a chunk is added
    after the join. A document's first token has a Δ so large that nothing passes it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[1]
    padding = -length % chunk_size
    A, x, dt = (y.to(dtype) for y in (A, x, time_steps(dt.to(dtype), dt_bias)))
    added, passed = dt * x, dt
    if doc_ids is not None:
        passed = passed.masked_fill(document_starts(doc_ids)[..., None], -RESET)
    added, passed, B, C = (
        F.pad(y.to(dtype), (0, 0, 0, padding)).unflatten(1, (-1, chunk_size))
        for y in (added, passed, B, C)
    )
    passed_since_start = passed.cumsum(dim=2)
    decay = (passed[..., None] * A).exp()  # [B, N_chunks, C, D, N]
    inputs = added[..., None] * B[..., None, :]
    states = []
    state = torch.zeros_like(inputs[:, :, 0])
    # unbind, not indexing: its backward writes each gradient once.
    for token_decay, token_input in zip(decay.unbind(dim=2), inputs.unbind(dim=2), strict=True):
        state = token_decay * state + token_input
        states.append(state)
    total = passed_since_start[:, :, -1, :, None]
    joined = JoinedStates(scan, Diagonal(total, A), state, initial_state)

    since_start = (passed_since_start[..., None] * A).exp()
    entering, final = joined.wait()
    whole = torch.addcmul(torch.stack(states, dim=2), since_start, entering[:, :, None])
    output = torch.einsum("bnlds,bnls->bnld", whole, C)
    return gated(output.flatten(1, 2)[:, :length], x, D, z), final
