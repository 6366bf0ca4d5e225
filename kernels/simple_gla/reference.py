"""Simple GLA, retention and plain linear attention in plain PyTorch: the truth, and the CPU
backend.

q, k: [B, T, H, K].  v: [B, T, H, V].  g: [B, T, H] or [H], natural log of the decay, at most 0;
None for no decay. States: [B, H, K, V]. N chunks of C tokens; G is the running sum of g inside a
chunk. Differences of G are formed before exp, so that only non-positive numbers are exponentiated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import chunk_documents, document_starts, pad_doc_ids
from fla_dist.kernels.common.precision import without_autocast
from fla_dist.kernels.state import LOCAL, RESET, Diagonal, JoinedStates, Scan


def token_decays(g: Tensor | None, like: Tensor) -> Tensor:
    """The log decays as [B, T, H], whatever their setting."""
    if g is None:
        return like.new_zeros(like.shape[:3])
    return g.to(like.dtype).expand(like.shape[:3])


def simple_gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token. The dtype of the inputs is that of the arithmetic."""
    batch, length, heads, key_size = q.shape
    decay = token_decays(g, q).exp()[..., None, None]
    state = (
        q.new_zeros(batch, heads, key_size, v.shape[-1]) if initial_state is None else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        state = decay[:, t] * state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


@without_autocast
def simple_gla_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Summarize the chunks, join them, add what each takes from inside and from before. In fp32,
    or fp64 if given."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    length = q.shape[1]
    padding = -length % chunk_size
    q, k, v = (x.to(dtype) for x in (q, k, v))
    g = token_decays(g, q)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk_size)) for x in (q, k, v))
    g = F.pad(g, (0, 0, 0, padding)).unflatten(1, (-1, chunk_size))
    documents = None
    if doc_ids is not None:
        documents = chunk_documents(pad_doc_ids(doc_ids, padding), chunk_size)

    cumulative = g.cumsum(dim=2)  # [B, N, C, H]
    total = cumulative[:, :, -1]  # [B, N, H]
    k_to_end = k * (total[:, :, None] - cumulative).exp()[..., None]
    log_decay = total[..., None, None]
    if documents is not None:
        k_to_end = k_to_end * documents.last[..., None, None]
        log_decay = log_decay.masked_fill(documents.restarts[..., None, None, None], RESET)
    chunk_state = torch.einsum("bnchk,bnchv->bnhkv", k_to_end, v)
    joined = JoinedStates(scan, Diagonal(log_decay), chunk_state, initial_state)

    visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
    pairs = visible if documents is None else documents.pairs & visible
    pairs = pairs[..., None]  # [(B, N,) C, C, 1]
    exponent = cumulative[:, :, :, None] - cumulative[:, :, None]  # [B, N, C, C, H]
    decay = exponent.masked_fill(~pairs, 0).exp() * pairs
    scores = torch.einsum("bnthk,bnshk,bntsh->bnhts", q, k, decay)
    output = torch.einsum("bnhts,bnshv->bnthv", scores, v)

    q_from_start = q * cumulative.exp()[..., None]
    if documents is not None:
        q_from_start = q_from_start * documents.continues[..., None, None]
    entering, final = joined.wait()
    output = output + torch.einsum("bnchk,bnhkv->bnchv", q_from_start, entering)
    return scale * output.flatten(1, 2)[:, :length], final
