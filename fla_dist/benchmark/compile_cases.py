"""The launches that `compile-check` compiles: every family trained at every setting of its table
and at one common size; thoroughly, also at other sizes and dtypes that its rule serves, packed, and
with every kind of decay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fla_dist.benchmark.compile_check import compile_all, record
from fla_dist.kernels.common.fold import on_gpu
from fla_dist.kernels.gated_delta_rule.op import segmented_gated_delta_rule
from fla_dist.kernels.gated_delta_rule.settings import TUNED as GATED_DELTA_RULE_TUNED
from fla_dist.kernels.gla.op import SegmentedGLA
from fla_dist.kernels.gla.settings import TUNED as GLA_TUNED
from fla_dist.kernels.gsa.op import SegmentedGSA
from fla_dist.kernels.hgrn.op import SegmentedHGRN
from fla_dist.kernels.kda.op import segmented_kda
from fla_dist.kernels.mamba.op import segmented_selective_scan
from fla_dist.kernels.mamba2.op import SegmentedStateSpaceDual
from fla_dist.kernels.rwkv7.op import segmented_rwkv7
from fla_dist.kernels.short_convolution.op import triton_short_convolution
from fla_dist.kernels.simple_gla.op import SegmentedSimpleGLA
from fla_dist.kernels.simple_gla.settings import TUNED as SIMPLE_GLA_TUNED
from fla_dist.kernels.state import LOCAL
from fla_dist.kernels.swiglu.op import triton_swiglu_linear

_ARCHITECTURES = (80, 90)
_MAMBA2 = {(architecture, 128, 64) for architecture in _ARCHITECTURES}
_TOKENS, _HEADS, _CHANNELS, _SLOTS = 2048, 16, 256, 64


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def _documents(packed: bool) -> Tensor | None:
    return torch.zeros(1, _TOKENS, dtype=torch.int32) if packed else None


def _train(output: Tensor, final: Tensor) -> None:
    torch.autograd.backward([output, final], [torch.empty_like(output), torch.empty_like(final)])


def _qkv(sizes: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    return [_empty(1, _TOKENS, _HEADS, width, dtype=dtype) for width in (sizes[0], *sizes)]


def _attention(
    function: type[torch.autograd.Function],
    decays: Callable[[], list[Tensor | None]],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    packed: bool,
) -> None:
    q, k, v = _qkv(sizes, dtype)
    for g in decays():
        _train(*function.apply(q, k, v, g, None, _documents(packed), 0.5, on_gpu(LOCAL)))


def _simple_gla(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def decays() -> list[Tensor | None]:
        return [torch.empty(_HEADS), _empty(1, _TOKENS, _HEADS), *[None] * thorough]

    return lambda: _attention(SegmentedSimpleGLA, decays, sizes, dtype, packed)


def _mamba2(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def launches() -> None:
        C, B = (_empty(1, _TOKENS, 1, sizes[0], dtype=dtype) for _ in range(2))
        x = _empty(1, _TOKENS, _HEADS, sizes[1], dtype=dtype)
        g, dt = (_empty(1, _TOKENS, _HEADS) for _ in range(2))
        _train(
            *SegmentedStateSpaceDual.apply(
                C, B, x, g, dt, _empty(_HEADS), None, _documents(packed), on_gpu(LOCAL)
            )
        )

    return launches


def _gla(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    """GLA, HGRN2's keys and RWKV6's bonus."""

    def launches() -> None:
        q, k, v = _qkv(sizes, dtype)
        bonus = _empty(_HEADS, sizes[0])
        for keys, u in ((k, None), (None, None), (k, bonus)):
            for g_dtype in [dtype] + [torch.float32] * thorough:
                g = _empty(1, _TOKENS, _HEADS, sizes[0], dtype=g_dtype)
                _train(
                    *SegmentedGLA.apply(
                        q, keys, v, g, u, None, _documents(packed), 0.5, on_gpu(LOCAL)
                    )
                )

    return launches


def _gsa(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def decays() -> list[Tensor | None]:
        dtypes = [dtype] + [torch.float32] * thorough
        return [_empty(1, _TOKENS, _HEADS, _SLOTS, dtype=each) for each in dtypes]

    return lambda: _attention(SegmentedGSA, decays, sizes, dtype, packed)


def _hgrn(dtype: torch.dtype, packed: bool) -> Callable[[], None]:
    def launches() -> None:
        x, g = (_empty(1, _TOKENS, _CHANNELS, dtype=dtype) for _ in range(2))
        _train(*SegmentedHGRN.apply(x, g, None, _documents(packed), LOCAL))

    return launches


def _mamba(dtype: torch.dtype, packed: bool) -> Callable[[], None]:
    def launches() -> None:
        x, dt, z = (_empty(1, _TOKENS, _CHANNELS, dtype=dtype) for _ in range(3))
        B, C = (_empty(1, _TOKENS, 16, dtype=dtype) for _ in range(2))
        rank = _empty(1, _TOKENS, 16, dtype=dtype)
        out, dt_out = _empty(16, _CHANNELS, dtype=dtype), _empty(_CHANNELS, 16, dtype=dtype)
        for steps, weights in ((dt, {}), (rank, {"weight": out, "dt_weight": dt_out})):
            output = segmented_selective_scan(
                x, steps, _empty(_CHANNELS, 16), B, C, dt_bias=_empty(_CHANNELS),
                D=_empty(_CHANNELS), z=z, doc_ids=_documents(packed), **weights,
            )  # fmt: skip
            _train(*output)

    return launches


def _short_convolution(dtype: torch.dtype, packed: bool) -> Callable[[], None]:
    def launches() -> None:
        x, left = (_empty(1, length, _CHANNELS, dtype=dtype) for length in (_TOKENS, 3))
        positions = torch.arange(_TOKENS, dtype=torch.int32)[None]
        y = triton_short_convolution(x, _empty(_CHANNELS, 4), None, left, positions, True)
        torch.autograd.backward(y, torch.empty_like(y))

    return launches


def _swiglu(dtype: torch.dtype, packed: bool) -> Callable[[], None]:
    def launches() -> None:
        width = 2 * _CHANNELS
        y = triton_swiglu_linear(
            _empty(1, _TOKENS, width, dtype=dtype), _empty(8, _CHANNELS, dtype=dtype)
        )
        torch.autograd.backward(y, torch.empty_like(y))

    return launches


def _gated_delta_rule(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def launches() -> None:
        q, k, v = _qkv(sizes, dtype)
        beta = _empty(1, _TOKENS, _HEADS)
        for g in (_empty(1, _TOKENS, _HEADS), *(None,) * thorough):
            _train(
                *segmented_gated_delta_rule(q, k, v, g, beta, scale=0.5, doc_ids=_documents(packed))
            )

    return launches


def _kda(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def launches() -> None:
        q, k, v = _qkv(sizes, dtype)
        beta = _empty(1, _TOKENS, _HEADS)
        for g_dtype in [dtype] + [torch.float32] * thorough:
            g = _empty(1, _TOKENS, _HEADS, sizes[0], dtype=g_dtype)
            _train(*segmented_kda(q, k, v, g, beta, scale=0.5, doc_ids=_documents(packed)))

    return launches


def _rwkv7(
    sizes: tuple[int, int], dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def launches() -> None:
        K, V = sizes
        r, k, v, a, b = (_empty(1, _TOKENS, _HEADS, w, dtype=dtype) for w in (K, K, V, K, K))
        for g_dtype in [dtype] + [torch.float32] * thorough:
            g = _empty(1, _TOKENS, _HEADS, K, dtype=g_dtype)
            _train(*segmented_rwkv7(r, g, k, v, a, b, scale=1.0, doc_ids=_documents(packed)))

    return launches


def _cases(architecture: int, thorough: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    packings = (False, True) if thorough else (False,)
    halves = [torch.bfloat16] + [torch.float16] * thorough
    for name, make, tuned in (
        ("simple_gla", _simple_gla, SIMPLE_GLA_TUNED),
        ("mamba2", _mamba2, _MAMBA2),
        ("gla", _gla, GLA_TUNED),
        ("gsa", _gsa, {}),
        ("gated_delta_rule", _gated_delta_rule, GATED_DELTA_RULE_TUNED),
        ("kda", _kda, {}),
        ("rwkv7", _rwkv7, {}),
    ):
        sizes = {(128, 128)} | {(k, v) for capability, k, v in tuned if capability == architecture}
        if thorough:
            sizes |= {(64, 128), (256, 64) if name == "mamba2" else (256, 256)}
            if name in ("simple_gla", "gla"):
                sizes.add((256, 512))
            if name == "mamba2" and architecture >= 90:  # spills before, and is not dispatched
                sizes.add((256, 128))
        for size in sorted(sizes):
            for dtype in halves + [torch.float32] * (thorough and max(size) <= 128):
                for packed in packings:
                    label = f"{name} K={size[0]} V={size[1]} {_shown(dtype, packed)}"
                    yield label, make(size, dtype, packed, thorough)
    for name, make_layer in (
        ("hgrn", _hgrn), ("mamba", _mamba), ("short_convolution", _short_convolution),
        ("swiglu", _swiglu),
    ):  # fmt: skip
        for dtype in halves:
            for packed in packings:
                yield f"{name} {_shown(dtype, packed)}", make_layer(dtype, packed)


def _shown(dtype: torch.dtype, packed: bool) -> str:
    return str(dtype).removeprefix("torch.") + " packed" * packed


def check_all(*, thorough: bool) -> bool:
    """Prints a row for every kernel; False where one would not launch, or spills much."""
    labels, kernels = [], []
    for architecture in _ARCHITECTURES:
        for label, launches in _cases(architecture, thorough):
            for recorded in record(architecture, launches):
                labels.append(f"sm_{architecture} {label}")
                kernels.append((recorded, architecture))
    fine, last = True, ""
    for label, row in zip(labels, compile_all(kernels, len(os.sched_getaffinity(0))), strict=True):
        if label != last:
            print(label)
        last = label
        print(
            f"  {row.kernel:22} {row.registers:4} registers {row.local_bytes:5} B local"
            f" {row.shared_bytes:7} B shared {row.seconds:5.1f} s  {row.problem}",
            flush=True,
        )  # fmt: skip
        fine = fine and not row.problem
    return fine
