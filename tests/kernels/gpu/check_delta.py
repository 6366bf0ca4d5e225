"""The delta rule, the gated delta rule and KDA on a GPU against the fp64 reference: `python -m
tests.kernels.gpu.check_delta [op] [K V]`.

Calls the kernels themselves, also where the public op would choose the reference. Prints the
largest error of every output and gradient by kind of input, dtype and head size, and every case
beyond its limit; runs each case twice and expects the same bits. Kinds, and packed documents or
not, run side by side: most of the time is compiling.

Usual inputs (keys of length 1, beta up to 1) are held to LIMITS, or twice what rounding the result
loses where its numbers are too small for the dtype; all dtypes hold the inputs exactly, so that one
reference serves all. Where keys are nearly parallel and beta goes up to 2, the result is
as uncertain as its 16-bit inputs: there, in bf16, the limit is three times what one rounding of the
inputs changes in fp64, where that is more.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from tests.kernels import test_delta_triton, test_kda_triton
from tests.kernels.gpu.check_linear_attention import LIMITS
from tests.kernels.gradient_check import errors, run
from tests.kernels.test_delta_triton import DeltaCase, make_delta_case
from tests.kernels.test_kda_triton import make_kda_case

OPS = {
    "gated_delta_rule": (make_delta_case, test_delta_triton),
    "kda": (make_kda_case, test_kda_triton),
}
SIZES = (
    (128, 128), (64, 64), (64, 128), (128, 256), (256, 128), (256, 256), (256, 512), (64, 192),
    (192, 64), (96, 160), (160, 192), (24, 40),
)  # fmt: skip
LENGTHS = {"usual": (1, 15, 64, 100, 4133), "hard": (100, 4133), "parallel": (100, 4133)}
DECAYS = {
    "usual": ("none", "slow", "normal", "strong", "mixed"),
    "hard": ("none", "mixed"),
    "parallel": ("none", "mixed"),
}
DRAWN = {"none": "normal", "slow": "normal"}
ROUNDED = ("q", "k", "v", "output_gradient")


def rounded(case: DeltaCase) -> DeltaCase:
    """The case in fp64 with the inputs moved by up to half a unit in the last place."""
    half = torch.finfo(case.q.dtype).eps / 2
    generator = torch.Generator(case.q.device).manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        return x.double() * (1 + half * (2 * noise - 1))

    return replace(case, **{name: moved(getattr(case, name)) for name in ROUNDED})


def one_segment(op: ModuleType, case: DeltaCase) -> dict[str, Tensor]:
    """As `run`, in one segment a head, as long sequences have: what a walk carries from chunk to
    chunk has time to drift."""
    chosen = op.steps.settings
    with mock.patch.object(op.steps, "settings", lambda *key: replace(chosen(*key), programs=1)):
        return run(op.triton_op, case)


def check(name: str, kind: str, packed: bool, key_size: int, value_size: int) -> bool:
    """kind: usual | hard | parallel, the last two with two value heads a key head."""
    make, op = OPS[name]
    options = {} if kind == "usual" or name == "kda" else {"group": 2}
    worst: dict[torch.dtype, dict[str, float]] = {}
    fine = True
    for length in LENGTHS[kind]:
        for decay in DECAYS[kind]:
            if name == "kda" and decay == "none":
                continue
            made = make(
                (2, length, 2, key_size, value_size), DRAWN.get(decay, decay), kind,
                packed=packed, dtype=torch.bfloat16, device="cuda", **options,
            )  # fmt: skip
            if decay in ("none", "slow"):
                made = replace(made, g=None if decay == "none" else made.g / 20)
            shared = {field: getattr(made, field).half() for field in ROUNDED}
            truth = run(op.reference_op, replace(made, **shared), torch.float64)
            for dtype in LIMITS if kind == "usual" else (torch.bfloat16,):
                case = replace(made, **{field: x.to(dtype) for field, x in shared.items()})
                result, again = run(op.triton_op, case), run(op.triton_op, case)
                same = all(torch.equal(result[key], again[key]) for key in result)
                found = errors(result, truth)
                held = {key: x.to(result[key].dtype) for key, x in truth.items()}
                limits = {
                    key: max(LIMITS[dtype], 2 * lost) for key, lost in errors(held, truth).items()
                }
                if kind != "usual":
                    moved = errors(run(op.reference_op, rounded(case), torch.float64), truth)
                    limits = {key: max(limits[key], 3 * moved[key]) for key in found}
                if length > 4096:
                    whole = errors(one_segment(op, case), truth)
                    found |= {f"{key}, one segment": value for key, value in whole.items()}
                    limits |= {f"{key}, one segment": limit for key, limit in limits.items()}
                beyond = {key: value for key, value in found.items() if value > limits[key]}
                if beyond or not same:
                    where = (name, kind, dtype, key_size, value_size, length, decay, packed)
                    print("  beyond the limit:", *where, beyond, same, flush=True)
                    fine = False
                largest = worst.setdefault(dtype, {})
                for key, value in found.items():
                    largest[key] = max(largest.get(key, 0.0), value)
    for dtype, largest in worst.items():
        shown = {key: f"{value:.1e}" for key, value in largest.items()}
        print(name, kind, "packed" * packed, dtype, key_size, value_size, shown, flush=True)
    return fine


def main() -> int:
    chosen = tuple(int(word) for word in sys.argv[1:] if word.isdigit())
    names = [word for word in sys.argv[1:] if word in OPS] or list(OPS)
    work = [
        (name, kind, packed, *sizes)
        for sizes in SIZES
        if chosen in ((), sizes)
        for name in names
        for kind in LENGTHS
        for packed in (False, True)
    ]
    processes = min(len(work), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return 0 if all(list(pool.map(check, *zip(*work, strict=True)))) else 1


if __name__ == "__main__":
    sys.exit(main())
