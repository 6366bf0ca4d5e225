"""RWKV7's kernels on a GPU against the fp64 reference: `python -m tests.kernels.gpu.check_rwkv7
[K V]`.

Calls the kernels themselves, also where the public op would choose the reference. Prints the
largest error of every output and gradient by kind of input, dtype and head size, and every case
beyond its limit; runs each case twice and expects the same bits.

Usual inputs (learning rates up to 1) are held to LIMITS. Where a's are nearly parallel and rates go
up to 2, the result is as uncertain as its 16-bit inputs: there the limit is three times what one
rounding of the inputs to the dtype changes in fp64, where that is more.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from tests.kernels.gpu.check_linear_attention import LIMITS
from tests.kernels.gradient_check import errors, run
from tests.kernels.test_rwkv7_triton import RWKV7Case, make_rwkv7_case, reference_op, triton_op

SIZES = (
    (128, 128), (64, 64), (64, 128), (256, 256), (128, 256), (256, 128), (64, 192), (192, 64),
    (160, 192), (24, 40),
)  # fmt: skip
LENGTHS = (16, 64, 100, 4133)
ROUNDED = ("q", "k", "v", "a", "b", "output_gradient")


def rounded(case: RWKV7Case) -> RWKV7Case:
    """The case in fp64 with the inputs moved by up to half a unit in the last place."""
    half = torch.finfo(case.q.dtype).eps / 2
    generator = torch.Generator(case.q.device).manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        return x.double() * (1 + half * (2 * noise - 1))

    return replace(case, **{name: moved(getattr(case, name)) for name in ROUNDED})


def check(kind: str, dtype: torch.dtype, key_size: int, value_size: int) -> bool:
    """kind: usual | hard."""
    worst: dict[str, float] = {}
    fine = True
    for length in LENGTHS:
        for decay in ("normal", "strong", "mixed", "paper"):
            for packed in (False, True):
                case = make_rwkv7_case(
                    (2, length, 2, key_size, value_size), decay, kind,
                    packed=packed, dtype=dtype, device="cuda",
                )  # fmt: skip
                result, again = run(triton_op, case), run(triton_op, case)
                truth = run(reference_op, case, torch.float64)
                found = errors(result, truth)
                limits = dict.fromkeys(found, LIMITS[dtype])
                if kind != "usual":
                    moved = errors(run(reference_op, rounded(case), torch.float64), truth)
                    limits = {key: max(limits[key], 3 * moved[key]) for key in found}
                same = all(torch.equal(result[key], again[key]) for key in result)
                beyond = {key: value for key, value in found.items() if value > limits[key]}
                if beyond or not same:
                    print("  beyond the limit:", length, decay, packed, beyond, same, flush=True)
                    fine = False
                for key, value in found.items():
                    worst[key] = max(worst.get(key, 0.0), value)
    shown = {key: f"{value:.1e}" for key, value in worst.items()}
    print(kind, dtype, key_size, value_size, shown, flush=True)
    return fine


def main() -> int:
    chosen = tuple(map(int, sys.argv[1:]))
    fine = True
    for sizes in SIZES:
        if chosen in ((), sizes):
            for dtype in LIMITS:
                fine = check("usual", dtype, *sizes) and fine
            fine = check("hard", torch.bfloat16, *sizes) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
