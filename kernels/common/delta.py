"""The chunked delta rules in plain PyTorch: one form for DeltaNet, gated DeltaNet, KDA and RWKV7.

All four are, with their own a and b,

    S_t = (diag(exp g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

With u_t = S_{t-1}ᵀ a_t, what the state already holds along a_t, and G the
running sum of g inside a chunk, the state is a sum over the tokens s before,

    S_t = exp(G_t) ⊙ S_0 + Σ_{s ≤ t} exp(G_t - G_s) ⊙ (b_s u_sᵀ + k_s v_sᵀ),

so the rows u of a chunk solve a unit lower triangular system (the WY form, arXiv:2406.06484):

    (1 - A_ab) U = Ā S_0 + A_ak V,   A_ab[t, s] = Σ_k a_t exp(G_{t-1} - G_s) b_s for s < t.

q, k, a, b, g: [B, T, H, K]; g also [B, T, H, 1].  v: [B, T, H, V].  States: [B, H, K, V]. N chunks
of C tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import chunk_documents, pad_doc_ids
from fla_dist.kernels.common.precision import without_autocast
from fla_dist.kernels.state import LOCAL, Dense, JoinedStates, Scan


@without_autocast
def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Summarize the chunks, join them, and add what each takes from inside and from before. In
    fp32, or fp64 if given."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    length = q.shape[1]
    padding = -length % chunk_size
    q, k, v, a, b, g = (
        F.pad(x.to(dtype), (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk_size)).transpose(2, 3)
        for x in (q, k, v, a, b, g)
    )  # [B, N, H, C, K]
    until = g.cumsum(dim=3)
    before = until - g  # the running sum without the token's own
    total = until[..., -1:, :]
    to_end = (total - until).exp()
    q_from_start, a_from_start = q * until.exp(), a * before.exp()
    k_to_end, b_to_end = k * to_end, b * to_end
    passed = total.exp().transpose(-1, -2)  # [B, N, H, K or 1, 1]
    visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
    if doc_ids is not None:
        documents = chunk_documents(pad_doc_ids(doc_ids, padding), chunk_size)
        visible = (documents.pairs & visible)[:, :, None]
        continues, last = (x[:, :, None, :, None] for x in (documents.continues, documents.last))
        q_from_start, a_from_start = q_from_start * continues, a_from_start * continues
        k_to_end, b_to_end = k_to_end * last, b_to_end * last
        passed = passed * ~documents.restarts[..., None, None, None]

    earlier = visible.tril(-1)
    from_b = _pairs(a, b, before, until, earlier)
    inside = _pairs(a, k, before, until, earlier) @ v
    identity = torch.eye(chunk_size, dtype=dtype, device=q.device)
    solved = torch.linalg.solve_triangular(
        identity - from_b,
        torch.cat([a_from_start, inside], dim=-1),
        upper=False,
        unitriangular=True,
    )
    w, u = solved.split([a.shape[-1], v.shape[-1]], dim=-1)  # U = w S_0 + u

    transition = torch.diag_embed(passed.squeeze(-1).expand(*passed.shape[:3], a.shape[-1]))
    transition = transition + b_to_end.mT @ w
    joined = JoinedStates(scan, Dense(transition), b_to_end.mT @ u + k_to_end.mT @ v, initial_state)
    scores = _pairs(q, b, until, until, visible)
    output = scores @ u + _pairs(q, k, until, until, visible) @ v
    from_state = q_from_start + scores @ w
    entering, final = joined.wait()
    output = output + from_state @ entering
    return scale * output.transpose(2, 3).flatten(1, 2)[:, :length], final


def _pairs(x: Tensor, y: Tensor, until_x: Tensor, until_y: Tensor, visible: Tensor) -> Tensor:
    """Σ_k x_t exp(until_x_t - until_y_s) y_s of the visible pairs t, s: [B, N, H, C, C]."""
    exponent = until_x[..., :, None, :] - until_y[..., None, :, :]
    decay = exponent.masked_fill(~visible[..., None], 0).exp() * visible[..., None]
    if decay.shape[-1] == 1:
        return (x @ y.mT) * decay[..., 0]
    return torch.einsum("bnhtk,bnhsk,bnhtsk->bnhts", x, y, decay)
