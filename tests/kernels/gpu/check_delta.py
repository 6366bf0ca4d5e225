"""The delta rule, the gated delta rule and KDA on a GPU against the fp64 reference: `python -m
tests.kernels.gpu.check_delta [op] [K V]`.

Calls the kernels themselves, also where the public op would choose the reference. Prints the
largest error of every output and gradient by kind of input, dtype and head size, and every case
beyond its limit; runs each case twice and expects the same bits.

Usual inputs (keys of length 1, beta up to 1) are held to LIMITS. Where keys are nearly parallel and
beta goes up to 2, the result is as uncertain as its 16-bit inputs: there the limit is three times
what one rounding of the inputs to the dtype changes in fp64, where that is more.
"""

from __future__ import annotations

import sys
from dataclasses import replace

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
SIZES = ((128, 128), (64, 64), (64, 128), (24, 40), (96, 160), (256, 128), (256, 256))
LENGTHS = (1, 15, 64, 100, 4133)
ROUNDED = ("q", "k", "v", "output_gradient")


def rounded(case: DeltaCase) -> DeltaCase:
    """The case in fp64 with the inputs moved by up to half a unit in the last place."""
    half = torch.finfo(case.q.dtype).eps / 2
    generator = torch.Generator(case.q.device).manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        return x.double() * (1 + half * (2 * noise - 1))

    return replace(case, **{name: moved(getattr(case, name)) for name in ROUNDED})


def check(
    name: str, kind: str, dtype: torch.dtype, key_size: int, value_size: int, heads: int = 1
) -> bool:
    """kind: usual | hard | parallel.  heads: value heads of a key head."""
    make, op = OPS[name]
    decays = ("normal", "strong", "mixed") + ("none",) * (name != "kda")
    options = {"group": heads} if heads > 1 else {}
    worst: dict[str, float] = {}
    fine = True
    for length in LENGTHS:
        for decay in decays:
            for packed in (False, True):
                case = make(
                    (2, length, 2, key_size, value_size), decay.replace("none", "normal"),
                    kind, packed=packed, dtype=dtype, device="cuda", **options,
                )  # fmt: skip
                if decay == "none":
                    case = replace(case, g=None)
                result, again = run(op.triton_op, case), run(op.triton_op, case)
                truth = run(op.reference_op, case, torch.float64)
                found = errors(result, truth)
                limits = dict.fromkeys(found, LIMITS[dtype])
                if kind != "usual":
                    moved = errors(run(op.reference_op, rounded(case), torch.float64), truth)
                    limits = {key: max(limits[key], 3 * moved[key]) for key in found}
                same = all(torch.equal(result[key], again[key]) for key in result)
                beyond = {key: value for key, value in found.items() if value > limits[key]}
                if beyond or not same:
                    print("  beyond the limit:", length, decay, packed, beyond, same, flush=True)
                    fine = False
                for key, value in found.items():
                    worst[key] = max(worst.get(key, 0.0), value)
    shown = {key: f"{value:.1e}" for key, value in worst.items()}
    print(name, kind, dtype, key_size, value_size, heads, shown, flush=True)
    return fine


def main() -> int:
    chosen = tuple(int(word) for word in sys.argv[1:] if word.isdigit())
    fine = True
    for name in [word for word in sys.argv[1:] if word in OPS] or OPS:
        heads = 1 if name == "kda" else 2
        for sizes in SIZES:
            if chosen in ((), sizes):
                for dtype in LIMITS:
                    fine = check(name, "usual", dtype, *sizes) and fine
                for kind in ("hard", "parallel"):
                    fine = check(name, kind, torch.bfloat16, *sizes, heads) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
