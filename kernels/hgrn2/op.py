"""HGRN2: the public function, a setting of GLA."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_dist.kernels.common.launch import is_checked
from fla_dist.kernels.common.validation import check, check_attention
from fla_dist.kernels.gla import gla
from fla_dist.kernels.gla.op import segmented_gla
from fla_dist.kernels.state import LOCAL, Scan

CHECKED = {(torch.bfloat16, size, size) for size in (64, 128, 256)}
"""(dtype, K, V), as blocks take them, at which GLA's kernels were checked on a GPU with keys that
they compute from the gates; elsewhere the keys are computed first."""


def hgrn2(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    scan: Scan = LOCAL,
) -> tuple[Tensor, Tensor]:
    """HGRN2 (arXiv:2404.07904, section 3.2): gated linear attention whose keys are 1 - forget gate.

        S_t = diag(exp g_t) S_{t-1} + (1 - exp g_t)ᵀ v_t        o_t = scale · q_t S_t

    Args:
        q: [B, T, H, K], bf16 | fp16 | fp32 | fp64, the paper's output gate.      v: [B, T, H, V].
        g: [B, T, H, K], natural log of the forget gate, at most 0.
        scale, initial_state, doc_ids, scan: as gla's.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [B, H, K, V] fp32: the state after the last token
        of this slice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and what was
        expected.
    """
    check_attention("hgrn2", q, q, v, initial_state, doc_ids)
    check("hgrn2", "g", g, tuple(q.shape), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_checked(q, q.shape[-1], v.shape[-1], CHECKED):
        return segmented_gla(
            q, None, v, g, None,
            scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan,
        )  # fmt: skip
    k = (-g.expm1()).to(q.dtype)
    return gla(q, k, v, g, scale=scale, initial_state=initial_state, doc_ids=doc_ids, scan=scan)
