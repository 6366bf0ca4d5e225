"""Finds launch settings on this machine's GPU and writes the tables that the kernels read:
launch/benchmark.py tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from fla_dist.benchmark.ops import LIMITS, OPS, Shape, errors, make_inputs, run
from fla_dist.kernels.common.launch import Launch, capability, write_tuned
from fla_dist.kernels.gla import settings as gla
from fla_dist.kernels.simple_gla import settings as simple_gla

_WALKS = (
    Launch(32, 4, 3), Launch(64, 4, 2), Launch(64, 4, 3), Launch(64, 4, 4), Launch(64, 4, 3, 168),
    Launch(64, 4, 4, 168), Launch(64, 8, 2), Launch(64, 8, 3), Launch(128, 8, 3), Launch(128, 8, 4),
)  # fmt: skip
_TILES = (Launch(16, 1, 2), Launch(16, 1, 3), Launch(32, 1, 2))
_SUMMARIES = (
    Launch(64, 4, 2), Launch(64, 4, 4), Launch(128, 4, 2), Launch(128, 8, 3), Launch(128, 8, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """module: with `settings` and `TUNED`.  candidates: the values to try for each field, in the
    order in which the fields are settled."""

    module: ModuleType
    candidates: Mapping[str, Sequence[Any]]


FAMILIES = {
    "simple_gla": Family(
        simple_gla,
        {"chunk": (32, 64), "output": _WALKS, "key_gradient": _WALKS, "summarize": _SUMMARIES},
    ),
    "gla": Family(
        gla,
        {
            "output": _WALKS, "query_gradient": _WALKS, "key_gradient": _WALKS,
            "pair_gradient": _TILES, "prepare": _TILES, "summarize": _SUMMARIES,
            "programs": (128, 256, 512),
        },
    ),
}  # fmt: skip


def search(
    start: Any, candidates: Mapping[str, Sequence[Any]], milliseconds: Callable[[Any], float]
) -> tuple[Any, float]:
    """The fastest settings found by settling one field after the other, and their time."""
    best, taken = start, {start: milliseconds(start)}
    for field, values in candidates.items():
        for value in values:
            tried = replace(best, **{field: value})
            if tried not in taken:
                taken[tried] = milliseconds(tried)
            best = min(best, tried, key=taken.__getitem__)
    return best, taken[best]


def tune(name: str, shape: Shape) -> None:
    """Searches settings for the op at this shape in bf16, and writes the family's table. What is
    wrong or does not launch is passed over."""
    family, op, dtype = FAMILIES[name], OPS[name], torch.bfloat16
    table, settings = family.module.TUNED, family.module.settings
    if (dtype, shape.K, shape.V) not in family.module.CHECKED:
        raise ValueError(f"tune: {name} has no checked kernels at K={shape.K}, V={shape.V}")
    inputs, output_gradient = make_inputs(op, shape, dtype)
    key = (capability(inputs[0]), shape.K, shape.V)
    short = replace(shape, B=1, T=min(shape.T, 4096))

    def milliseconds(tried: Any) -> float:
        table[key] = tried
        settings.cache_clear()
        try:
            if max(errors(op, short, dtype).values()) > LIMITS[dtype]:
                return float("inf")
            return triton.testing.do_bench(
                lambda: run(op.call, inputs, output_gradient), return_mode="median"
            )
        except triton.OutOfResources:
            return float("inf")

    best, least = search(settings(*key, inputs[0].element_size()), family.candidates, milliseconds)
    table[key] = best
    settings.cache_clear()
    if family.module.__file__ is None or least == float("inf"):
        raise RuntimeError(f"tune: no settings of {name} are right at K={shape.K}, V={shape.V}")
    write_tuned(Path(family.module.__file__).with_name("tuned.json"), table)
    print(f"{name} K={shape.K} V={shape.V}: {least:.3f} ms with {best}", flush=True)
