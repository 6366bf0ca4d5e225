"""Gated slot attention in plain PyTorch (arXiv:2409.07146): the truth, and the backend.

q, k: [B, T, H, K].  v: [B, T, H, V].  g: [B, T, H, M], natural log of the forget gates of M slots,
at most 0.  States: [B, H, M, K + V], keys and values of the slots side by side: they decay alike
and come from the tokens alone, so one exchange a direction serves both. N chunks of C tokens; G is
the running sum of g inside a chunk. Differences of G are formed before exp, so that only
non-positive numbers are exponentiated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import chunk_documents, document_starts, pad_doc_ids
from fla_dist.kernels.common.precision import without_autocast
from fla_dist.kernels.state import LOCAL, RESET, Diagonal, JoinedStates, Scan


def gsa_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, equations 6 to 8. The dtype of the inputs is that of the arithmetic."""
    batch, length, heads, key_size = q.shape
    kv = torch.cat([k, v], dim=-1)
    state = (
        q.new_zeros(batch, heads, g.shape[-1], kv.shape[-1])
        if initial_state is None
        else initial_state
    )
    starts = None if doc_ids is None else document_starts(doc_ids)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        forget = g[:, t].exp()[..., None]
        state = forget * state + (1 - forget) * kv[:, t][..., None, :]
        keys, values = state.split([key_size, v.shape[-1]], dim=-1)
        weights = (scale * torch.einsum("bhk,bhmk->bhm", q[:, t], keys)).softmax(dim=-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", weights, values))
    return torch.stack(outputs, dim=1), state


@without_autocast
def gsa_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Summarize the chunks, join them; then what each token's query takes of the slots' keys, from
    inside its chunk and from before; the softmax; and likewise what that takes of their values. In
    fp32, or fp64 if given."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    length, key_size, value_size = q.shape[1], q.shape[-1], v.shape[-1]
    padding = -length % chunk_size
    q, k, v, g = (
        F.pad(x.to(dtype), (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk_size))
        for x in (q, k, v, g)
    )
    documents = (
        None if doc_ids is None else chunk_documents(pad_doc_ids(doc_ids, padding), chunk_size)
    )

    cumulative = g.cumsum(dim=2)  # [B, N, C, H, M]
    total = cumulative[:, :, -1]  # [B, N, H, M]
    taken = -g.expm1()
    taken_to_end = taken * (total[:, :, None] - cumulative).exp()
    from_start = cumulative.exp()
    log_decay = total[..., None]
    if documents is not None:
        taken_to_end = taken_to_end * documents.last[..., None, None]
        from_start = from_start * documents.continues[..., None, None]
        log_decay = log_decay.masked_fill(documents.restarts[..., None, None, None], RESET)
    chunk_state = torch.einsum("bnchm,bnchx->bnhmx", taken_to_end, torch.cat([k, v], dim=-1))
    joined = JoinedStates(scan, Diagonal(log_decay), chunk_state, initial_state)

    visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
    pairs = visible if documents is None else documents.pairs & visible
    pairs = pairs[..., None, None]  # [(B, N,) C, C, 1, 1]
    exponent = cumulative[:, :, :, None] - cumulative[:, :, None]  # [B, N, C, C, H, M]
    held = exponent.masked_fill(~pairs, 0).exp() * pairs * taken[:, :, None]
    products = torch.einsum("bnthk,bnshk->bntsh", q, k)
    logits = torch.einsum("bntsh,bntshm->bnthm", products, held)

    entering, final = joined.wait()
    keys, values = entering.split([key_size, value_size], dim=-1)
    logits = logits + from_start * torch.einsum("bnthk,bnhmk->bnthm", q, keys)
    weights = (scale * logits).softmax(dim=-1)
    scores = torch.einsum("bnthm,bntshm->bnhts", weights, held)
    output = torch.einsum("bnhts,bnshv->bnthv", scores, v)
    output = output + torch.einsum("bnthm,bnhmv->bnthv", weights * from_start, values)
    return output.flatten(1, 2)[:, :length], final
