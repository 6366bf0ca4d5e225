"""Inputs, and an op's outputs and every gradient against its fp64 reference: for the interpreter's
tests and the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    doc_ids: Tensor | None
    output_gradient: Tensor
    state_gradient: Tensor


def make_case(
    shape: tuple[int, int, int, int, int],
    decay: str,
    *,
    packed: bool,
    dtype: torch.dtype,
    device: str,
    vector: bool,
) -> Case:
    """shape: B, T, H, K, V.  decay: normal | strong | mixed.  Packed cases have an initial state,
    the others none."""
    batch, length, heads, key_size, value_size = shape
    generator = torch.Generator().manual_seed(length + key_size)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    size = (batch, length, heads, key_size) if vector else (batch, length, heads)
    strong = -30 * uniform(*size)
    g = {
        "normal": F.logsigmoid(normal(*size)) / 4,
        "strong": strong,
        "mixed": torch.where(uniform(*size) < 0.3, strong, -0.01 * uniform(*size)),
    }[decay]
    starts = uniform(batch, length) < max(1 / 50, 1.5 / length)
    starts[:, 0] = uniform(batch) < 0.3
    q, k, v, do = (
        normal(batch, length, heads, w).to(device, dtype)
        for w in (key_size, key_size, value_size, value_size)
    )
    state, state_gradient = (
        normal(batch, heads, key_size, value_size).to(device) for _ in range(2)
    )
    return Case(
        q, k, v, g.to(device), state if packed else None,
        starts.cumsum(1).int().to(device) if packed else None,
        do, state_gradient,
    )  # fmt: skip


def run(
    op: Callable[[Case], tuple[Tensor, Tensor]], case: Case, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """o, the final state and the gradients of all inputs."""
    names = vars(case).keys() - {"doc_ids", "output_gradient", "state_gradient"}
    leaves = {
        name: getattr(case, name).detach().to(dtype or getattr(case, name).dtype).requires_grad_()
        for name in names
        if getattr(case, name) is not None
    }
    output, final = op(replace(case, **leaves))
    loss = (output.double() * case.output_gradient.double()).sum()
    (loss + (final.double() * case.state_gradient.double()).sum()).backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"o": output.detach(), "final_state": final.detach(), **gradients}


def errors(result: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """‖x - reference‖ / ‖reference‖; not a number counts as infinite."""
    found = {}
    for name, truth in reference.items():
        error = (result[name].double() - truth.double()).norm() / truth.double().norm().clamp(
            min=1e-30
        )
        found[name] = float("inf") if error.isnan() else error.item()
    return found
