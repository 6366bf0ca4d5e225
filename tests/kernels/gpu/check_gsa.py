"""GSA on a GPU against the fp64 reference: `python -m tests.kernels.gpu.check_gsa [M K V]`.

Calls the kernels themselves, also where the public op would choose the reference. Prints the
largest error of every output and gradient by dtype, slots and head size, and every case beyond the
limit; runs each case twice and expects the same bits.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.gsa import steps
from fla_dist.kernels.gsa.op import SegmentedGSA
from fla_dist.kernels.gsa.reference import gsa_chunked
from fla_dist.kernels.gsa.settings import SHORTEST
from fla_dist.kernels.state import LOCAL
from tests.kernels.gradient_check import Case, errors, make_case, run

LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SIZES = (
    (64, 128, 128), (64, 64, 64), (64, 256, 256), (64, 128, 256), (64, 256, 128), (64, 160, 192),
    (40, 64, 192), (64, 192, 64), (128, 128, 128), (128, 256, 256), (96, 192, 48),
)  # fmt: skip
LENGTHS = (SHORTEST, 64, 100, 4133)


def make_gsa_case(
    shape: tuple[int, int, int, int, int],
    slots: int,
    decay: str,
    *,
    packed: bool,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """`make_case`, with g [B, T, H, M] and states [B, H, M, K + V]."""
    *tokens, key_size, value_size = shape
    of_slots = make_case(
        (*tokens, slots, key_size + value_size),
        decay, packed=packed, dtype=dtype, device=device, vector=True,
    )  # fmt: skip
    case = make_case(shape, decay, packed=packed, dtype=dtype, device=device, vector=False)
    return replace(
        case, g=of_slots.g, initial_state=of_slots.initial_state, doc_ids=of_slots.doc_ids,
        state_gradient=of_slots.state_gradient,
    )  # fmt: skip


def by_kernels(c: Case) -> tuple[Tensor, Tensor]:
    scale = c.q.shape[-1] ** -0.5
    return SegmentedGSA.apply(c.q, c.k, c.v, c.g, c.initial_state, c.doc_ids, scale, on_gpu(LOCAL))


def by_reference(c: Case) -> tuple[Tensor, Tensor]:
    return gsa_chunked(
        c.q, c.k, c.v, c.g, scale=c.q.shape[-1] ** -0.5, initial_state=c.initial_state,
        doc_ids=c.doc_ids,
    )  # fmt: skip


def lengthen_segments() -> None:
    """To many chunks, at lengths for which the launch settings make them short: errors that chunks
    hand on show."""
    chosen = steps.settings
    steps.settings = lambda *sizes: replace(chosen(*sizes), programs=1)  # type: ignore[assignment]


def check(dtype: torch.dtype, slots: int, key_size: int, value_size: int) -> bool:
    worst: dict[str, float] = {}
    fine = True
    for length in LENGTHS:
        for decay in ("normal", "strong", "mixed"):
            for packed in (False, True):
                case = make_gsa_case(
                    (2, length, 2, key_size, value_size), slots, decay, packed=packed, dtype=dtype,
                    device="cuda",
                )  # fmt: skip
                result, again = run(by_kernels, case), run(by_kernels, case)
                found = errors(result, run(by_reference, case, torch.float64))
                same = all(torch.equal(result[name], again[name]) for name in result)
                beyond = {name: value for name, value in found.items() if value > LIMITS[dtype]}
                if beyond or not same:
                    shown = {name: f"{value:.1e}" for name, value in beyond.items()}
                    print("  beyond the limit:", length, decay, packed, shown, same)
                    fine = False
                worst |= {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    shown = {name: f"{value:.1e}" for name, value in worst.items()}
    print(dtype, slots, key_size, value_size, shown, flush=True)
    return fine


def main() -> int:
    lengthen_segments()
    given = tuple(int(size) for size in sys.argv[1:])
    sizes = (given,) if given else SIZES
    results = [check(dtype, *size) for size in sizes for dtype in LIMITS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
