"""RWKV6: the public function, GLA one token late."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_dist.kernels.common.documents import document_starts, pad_doc_ids
from fla_dist.kernels.common.launch import is_checked
from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.gla import gla
from fla_dist.kernels.gla.op import segmented_gla
from fla_dist.kernels.state import LOCAL, Scan

CHECKED = {(torch.bfloat16, size, size) for size in (64, 128, 256)}
"""(dtype, K, V), as blocks take them, at which GLA's kernels were checked on a GPU with a bonus."""


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """RWKV6's time mixing (Finch, arXiv:2404.05892, equations 18 and 19): the output reads the
    state before the token, and the token itself with the bonus u.

        S_t = diag(exp g_t) S_{t-1} + k_tᵀ v_t        o_t = r_t (S_{t-1} + diag(u) k_tᵀ v_t)

    GLA's kernels serve it, with the bonus where that was checked, and elsewhere one token late.

    Args:
        r, k: [B, T, H, K], bf16 | fp16 | fp32 | fp64.      v: [B, T, H, V].
        g: [B, T, H, K], natural log of the decay, at most 0.
        u: [H, K], the bonus of the current token.
        initial_state, doc_ids, scan: as gla's.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, K, V] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    check_attention("rwkv6", r, k, v, initial_state, doc_ids)
    check("rwkv6", "g", g, tuple(r.shape), r)
    check("rwkv6", "u", u, tuple(r.shape[2:]), r)
    if is_checked(r, r.shape[-1], v.shape[-1], CHECKED):
        return segmented_gla(
            r, k, v, g, u, scale=1.0, initial_state=initial_state, doc_ids=doc_ids, scan=scan
        )
    # With keys, values and decays one token late and one token more, GLA's state at token t is
    # S_{t-1}, and its final state is S_T.
    late_k, late_v, late_g = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (k, v, g))
    late_doc_ids = None
    if doc_ids is not None:
        # A document's first token sees no state, so nothing late either.
        starts = F.pad(document_starts(doc_ids), (0, 1))
        late_k = late_k.masked_fill(starts[..., None, None], 0)
        late_doc_ids = pad_doc_ids(doc_ids, 1)
    o, final_state = gla(
        F.pad(r, (0, 0, 0, 0, 0, 1)), late_k, late_v, late_g,
        scale=1.0, initial_state=initial_state, doc_ids=late_doc_ids, scan=scan,
    )  # fmt: skip
    dtype = torch.promote_types(v.dtype, torch.float32)
    bonus = (r.to(dtype) * u.to(dtype) * k.to(dtype)).sum(dim=-1, keepdim=True) * v.to(dtype)
    return (o[:, :-1].to(dtype) + bonus).to(v.dtype), final_state
