"""HGRN, HGRN2, RWKV6 and GSA: their messages about arguments that do not fit, and their dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_dist.kernels.gsa import gsa
from fla_dist.kernels.hgrn import hgrn
from fla_dist.kernels.hgrn2 import hgrn2
from fla_dist.kernels.rwkv6 import rwkv6

SHAPES = {
    hgrn: {"x": (2, 9, 6), "g": (2, 9, 6)},
    hgrn2: {"q": (2, 9, 2, 4), "v": (2, 9, 2, 6), "g": (2, 9, 2, 4)},
    rwkv6: {
        "r": (2, 9, 2, 4), "k": (2, 9, 2, 4), "v": (2, 9, 2, 6), "g": (2, 9, 2, 4), "u": (2, 4)
    },
    gsa: {"q": (2, 9, 2, 4), "k": (2, 9, 2, 4), "v": (2, 9, 2, 6), "g": (2, 9, 2, 3)},
}  # fmt: skip


def arguments(op, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: -torch.rand(shape, dtype=dtype) for name, shape in SHAPES[op].items()}


@pytest.mark.parametrize(
    ("op", "name", "shape", "message"),
    [
        (hgrn, "x", (2, 9), r"hgrn: x has shape \(2, 9\), expected \[B, T, D\]"),
        (hgrn, "g", (2, 9, 5), r"hgrn: g has shape \(2, 9, 5\), expected \(2, 9, 6\)"),
        (hgrn, "initial_state", (2, 5), r"hgrn: initial_state has .* expected \(2, 6\)"),
        (hgrn2, "g", (2, 9, 2, 6), r"hgrn2: g has .* expected \(2, 9, 2, 4\)"),
        (hgrn2, "doc_ids", (9,), r"hgrn2: doc_ids has shape \(9,\), expected \(2, 9\)"),
        (rwkv6, "u", (2, 6), r"rwkv6: u has shape \(2, 6\), expected \(2, 4\)"),
        (rwkv6, "g", (2, 9, 2), r"rwkv6: g has shape \(2, 9, 2\), expected \(2, 9, 2, 4\)"),
        (gsa, "g", (2, 9, 3), r"gsa: g has shape \(2, 9, 3\), expected \[B, T, H, M\]"),
        (gsa, "initial_state", (2, 2, 3, 4), r"gsa: initial_state has .*\(2, 2, 3, 10\)"),
    ],
)
def test_what_does_not_fit_is_named(op, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**{**arguments(op, torch.float32), name: torch.zeros(shape)})


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_fp32_states(op, dtype: torch.dtype) -> None:
    """Also beside gates in fp32, as the mixers give them."""
    inputs = arguments(op, dtype)
    exact, exact_state = op(**{name: x.double() for name, x in inputs.items()})
    for gate in (dtype, torch.float32):
        output, state = op(**{**inputs, "g": inputs["g"].to(gate)})
        assert output.dtype == dtype and state.dtype == torch.float32
        assert (output - exact).norm() <= 1e-2 * exact.norm()
        assert (state - exact_state).norm() <= 1e-2 * exact_state.norm()
