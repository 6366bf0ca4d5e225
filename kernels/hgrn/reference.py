"""HGRN's recurrence in plain PyTorch (arXiv:2311.04823): the truth, and the CPU backend.

x, g: [B, T, D]; g is the natural log of the forget gate, at most 0.  States: [B, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts
from fla_dist.kernels.common.precision import without_autocast
from fla_dist.kernels.state import LOCAL, RESET, Diagonal, JoinedStates, Scan


def hgrn_recurrent(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, equation 4 with real gates. The dtype of the inputs is that of the
    arithmetic."""
    batch, length, channels = x.shape
    state = x.new_zeros(batch, channels) if initial_state is None else initial_state
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None], 0)
        forget = g[:, t].exp()
        state = forget * state + (1 - forget) * x[:, t]
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


@without_autocast
def hgrn_chunked(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """All chunks walk their tokens side by side from a zero state; what enters a chunk is added
    after the join. In fp32, or fp64 if given."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[1]
    padding = -length % chunk_size
    g = g.to(dtype)
    added = -g.expm1() * x.to(dtype)
    if doc_ids is not None:
        g = g.masked_fill(document_starts(doc_ids)[..., None], RESET)
    added, g = (F.pad(y, (0, 0, 0, padding)).unflatten(1, (-1, chunk_size)) for y in (added, g))
    states = []
    state = torch.zeros_like(added[:, :, 0])
    # unbind, not indexing: its backward writes each gradient once.
    for token_decay, token_input in zip(g.exp().unbind(dim=2), added.unbind(dim=2), strict=True):
        state = token_decay * state + token_input
        states.append(state)
    since_start = g.cumsum(dim=2)
    joined = JoinedStates(scan, Diagonal(since_start[:, :, -1]), state, initial_state)
    from_start = since_start.exp()
    entering, final = joined.wait()
    output = torch.addcmul(torch.stack(states, dim=2), from_start, entering[:, :, None])
    return output.flatten(1, 2)[:, :length], final
