"""Simple GLA, retention, GLA, HGRN2 and RWKV6 on a GPU against the fp64 reference: `python -m
tests.kernels.gpu.check_linear_attention [op ...]`.

Calls the kernels themselves, also where the public op would choose the reference. Prints the
largest error of every output and gradient by op, dtype and head size, and every case beyond the
limit; runs each case twice and expects the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.gla import steps as gla_steps
from fla_dist.kernels.gla.op import SegmentedGLA
from fla_dist.kernels.gla.reference import gla_chunked
from fla_dist.kernels.hgrn2 import hgrn2
from fla_dist.kernels.rwkv6 import rwkv6
from fla_dist.kernels.simple_gla import steps as simple_gla_steps
from fla_dist.kernels.simple_gla.op import SegmentedSimpleGLA
from fla_dist.kernels.simple_gla.reference import simple_gla_chunked
from fla_dist.kernels.state import LOCAL
from tests.kernels.gradient_check import Case, errors, make_case, run

LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SIZES = (
    (128, 128), (64, 64), (64, 128), (24, 40), (256, 256), (256, 512), (128, 256), (256, 128),
    (64, 192), (192, 64), (160, 192), (64, 512), (512, 64), (512, 512),
)  # fmt: skip
LENGTHS = (1, 15, 33, 64, 100, 4133)
Op = Callable[[Case, float], tuple[Tensor, Tensor]]


def launched(function: Any, arguments: Callable[[Case], tuple[Tensor | None, ...]]) -> Op:
    """The kernels of an autograd function."""
    return lambda c, scale: function.apply(
        *arguments(c), c.initial_state, c.doc_ids, scale, on_gpu(LOCAL)
    )


def chunked(function: Callable[..., tuple[Tensor, Tensor]]) -> Op:
    return lambda c, scale: function(
        c.q, c.k, c.v, c.g, scale=scale, initial_state=c.initial_state, doc_ids=c.doc_ids
    )


def hgrn2_reference(c: Case, scale: float) -> tuple[Tensor, Tensor]:
    return hgrn2(
        c.q, c.v, c.g, scale=scale, initial_state=c.initial_state, doc_ids=c.doc_ids
    )  # fmt: skip


def rwkv6_reference(c: Case, scale: float) -> tuple[Tensor, Tensor]:
    return rwkv6(
        scale * c.q, c.k, c.v, c.g, c.k[0, 0], initial_state=c.initial_state, doc_ids=c.doc_ids
    )


OPS: dict[str, tuple[Op, Op]] = {
    "simple_gla": (
        launched(SegmentedSimpleGLA, lambda c: (c.q, c.k, c.v, c.g)), chunked(simple_gla_chunked)
    ),
    "gla": (launched(SegmentedGLA, lambda c: (c.q, c.k, c.v, c.g, None)), chunked(gla_chunked)),
    "hgrn2": (launched(SegmentedGLA, lambda c: (c.q, None, c.v, c.g, None)), hgrn2_reference),
    "rwkv6": (
        launched(SegmentedGLA, lambda c: (c.q, c.k, c.v, c.g, c.k[0, 0])), rwkv6_reference
    ),
}  # fmt: skip
"""The kernels, and the reference, which serves fp64. RWKV6's bonus is the first token's key, so
that its gradient is in dk."""


def lengthen_segments(steps: ModuleType) -> None:
    """To many chunks, at lengths for which the launch settings make them short: errors that chunks
    hand on show."""
    chosen = steps.settings
    steps.settings = lambda *key: replace(chosen(*key), programs=1, longest=2048)


def check(name: str, dtype: torch.dtype, key_size: int, value_size: int) -> bool:
    kernels, reference = OPS[name]
    scale = key_size**-0.5

    def launch(c: Case) -> tuple[Tensor, Tensor]:
        return kernels(c, scale)

    def truth(c: Case) -> tuple[Tensor, Tensor]:
        return reference(c, scale)

    worst: dict[str, float] = {}
    fine = True
    for length in LENGTHS:
        for decay in ("normal", "strong", "mixed"):
            for packed in (False, True):
                shape = (2, length, 2, key_size, value_size)
                case = make_case(
                    shape, decay, packed=packed, dtype=dtype, device="cuda",
                    vector=name != "simple_gla",
                )  # fmt: skip
                result, again = run(launch, case), run(launch, case)
                found = errors(result, run(truth, case, torch.float64))
                same = all(torch.equal(result[key], again[key]) for key in result)
                beyond = {key: value for key, value in found.items() if value > LIMITS[dtype]}
                if beyond or not same:
                    print(
                        "  beyond the limit:",
                        length,
                        decay,
                        "packed" if packed else "",
                        beyond,
                        same,
                    )
                    fine = False
                worst = {key: max(value, worst.get(key, 0.0)) for key, value in found.items()} | {
                    key: value for key, value in worst.items() if key not in found
                }
    print(
        name,
        dtype,
        key_size,
        value_size,
        {key: f"{value:.1e}" for key, value in worst.items()},
        flush=True,
    )
    return fine


def main() -> int:
    fine = True
    for steps in (gla_steps, simple_gla_steps):
        lengthen_segments(steps)
    for name in sys.argv[1:] or OPS:
        for key_size, value_size in SIZES:
            for dtype in LIMITS:
                fine = check(name, dtype, key_size, value_size) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
