"""The launches that `compile-check` compiles: every family at every setting of its table and at K =
V = 128; thoroughly, also at other sizes and dtypes that its rule serves, packed, and with every
kind of decay."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fla_dist.benchmark.compile_check import compile_all, record
from fla_dist.kernels.gla import steps as gla
from fla_dist.kernels.gla.settings import TUNED as GLA_TUNED
from fla_dist.kernels.hgrn import steps as hgrn
from fla_dist.kernels.linear_cross_entropy.triton_kernels import token_losses
from fla_dist.kernels.mamba import triton_backward as mamba_backward
from fla_dist.kernels.mamba import triton_forward as mamba
from fla_dist.kernels.short_convolution import triton_kernels as short_convolution
from fla_dist.kernels.simple_gla import steps as simple_gla
from fla_dist.kernels.simple_gla.settings import TUNED as SIMPLE_GLA_TUNED
from fla_dist.kernels.swiglu.triton_kernels import swiglu, swiglu_backward

_ARCHITECTURES = (80, 90)


def _inputs(key_size: int, value_size: int, dtype: torch.dtype, packed: bool) -> tuple[Tensor, ...]:
    tokens, heads = 2048, 16
    q = torch.empty(1, tokens, heads, key_size, dtype=dtype)
    v = torch.empty(1, tokens, heads, value_size, dtype=dtype)
    doc_ids = torch.zeros(1, tokens, dtype=torch.int32) if packed else None
    return q, v, doc_ids  # type: ignore[return-value]


def _simple_gla(
    key_size: int, value_size: int, dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def launches() -> None:
        q, v, doc_ids = _inputs(key_size, value_size, dtype, packed)
        for g in (torch.empty(q.shape[2]), torch.empty(q.shape[:3]), *(None,) * thorough):
            state, _ = simple_gla.summarize.function(q, v, g, doc_ids, 1.0, False)
            simple_gla.summarize.function(q, v, g, doc_ids, 0.5, True)
            simple_gla.output.function(q, q, v, g, doc_ids, state, 0.5)
            with_decay = g is not None and g.ndim == 3
            simple_gla.backward.function(
                q, q, v, v, g, doc_ids, state, state[:, 0], state, 0.5, with_decay
            )

    return launches


def _gla(
    key_size: int, value_size: int, dtype: torch.dtype, packed: bool, thorough: bool
) -> Callable[[], None]:
    def launches() -> None:
        q, v, doc_ids = _inputs(key_size, value_size, dtype, packed)
        for g in (torch.empty_like(q), *(torch.empty_like(q, dtype=torch.float32),) * thorough):
            prepared = gla.prepare.function(q, q, v, g, doc_ids, 0.5)
            q_in, k_out, decay, scores = prepared
            state, _ = gla.summarize.function(k_out, v, decay, False)
            gla.summarize.function(q_in, v, decay, True)
            gla.output.function(q_in, k_out, v, decay, scores, state)
            gla.backward.function(q, q, v, v, g, doc_ids, *prepared, state, state[:, 0], state, 0.5)

    return launches


def _loss_and_mlp(dtype: torch.dtype) -> Callable[[], None]:
    def launches() -> None:
        labels = torch.zeros(64, dtype=torch.int64)
        for weights in (None, torch.empty(64)):
            for gradient in (False, True):
                logits = torch.empty(64, 32000, dtype=dtype)
                token_losses._init_fn(logits, labels, weights, 0.0, gradient)
        gate_up = torch.empty(64, 12288, dtype=dtype)
        swiglu._init_fn(gate_up)
        swiglu_backward._init_fn(gate_up, torch.empty(64, 6144, dtype=dtype))

    return launches


def _hgrn(dtype: torch.dtype, gate_dtype: torch.dtype, packed: bool) -> Callable[[], None]:
    def launches() -> None:
        x, g = (torch.empty(1, 2048, 2048, dtype=kind) for kind in (dtype, gate_dtype))
        starts = torch.zeros(1, 2048, dtype=torch.bool) if packed else None
        state = torch.empty(1, 2048) if packed else None
        for write in (True, False):
            hgrn.forward.function(x, g, starts, state, write)
            hgrn.backward.function(x, g, x, x, starts, state, state, write)

    return launches


def _mamba(state_size: int, dtype: torch.dtype, gate: bool, packed: bool) -> Callable[[], None]:
    def launches() -> None:
        x = torch.empty(1, 2048, 4096, dtype=dtype)
        rate, skip = torch.empty(4096, state_size), torch.empty(4096)
        B = torch.empty(1, 2048, state_size)
        bias, z = (skip, x) if gate else (None, None)
        doc_ids = torch.zeros(1, 2048, dtype=torch.int32) if packed else None
        state, _ = mamba.summarize._init_fn(x, x, rate, B, bias, doc_ids)
        arguments = (x, x, rate, B, B, bias, skip, z)
        _, checkpoints = mamba.output._init_fn(*arguments, doc_ids, state, True)
        mamba_backward.summarize_gradient._init_fn(x, rate, B, x, bias, z, doc_ids)
        mamba_backward.backward._init_fn(*arguments, x, doc_ids, checkpoints, state)

    return launches


def _short_convolution(width: int, dtype: torch.dtype) -> Callable[[], None]:
    def launches() -> None:
        x, left = torch.empty(1, 2048, 4096, dtype=dtype), torch.empty(1, width - 1, 4096)
        weight, positions = torch.empty(4096, width), torch.zeros(1, 2048, dtype=torch.int32)
        arguments = (x, weight, weight[:, 0], left.to(dtype), positions)
        short_convolution.convolution._init_fn(*arguments, True)
        short_convolution.convolution_backward._init_fn(*arguments, x, True)

    return launches


def _cases(architecture: int, thorough: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, make, tuned in (
        ("simple_gla", _simple_gla, SIMPLE_GLA_TUNED),
        ("gla", _gla, GLA_TUNED),
    ):
        sizes = {(128, 128)} | {(k, v) for capability, k, v in tuned if capability == architecture}
        if thorough:
            sizes |= {(64, 128), (256, 256), (256, 512)}
        for key_size, value_size in sorted(sizes):
            dtypes = [torch.bfloat16]
            if thorough:
                dtypes += [torch.float16] + [torch.float32] * (value_size <= 128)
            for dtype in dtypes:
                for packed in (False, True) if thorough else (False,):
                    shown = str(dtype).removeprefix("torch.") + " packed" * packed
                    label = f"sm_{architecture} {name} K={key_size} V={value_size} {shown}"
                    yield label, make(key_size, value_size, dtype, packed, thorough)
    gates = [(torch.bfloat16, torch.bfloat16, False), (torch.bfloat16, torch.float32, True)]
    if thorough:
        gates += [(torch.float16, torch.float32, True), (torch.float32, torch.float32, True)]
    for dtype, gate_dtype, packed in gates:
        shown = f"{dtype} gates {gate_dtype}".replace("torch.", "") + " packed" * packed
        yield f"sm_{architecture} hgrn {shown}", _hgrn(dtype, gate_dtype, packed)
    mambas = [(16, torch.bfloat16, True, False)]
    if thorough:
        mambas += [(16, torch.bfloat16, False, True), (16, torch.float32, True, True)]
        mambas += [(64, torch.bfloat16, True, False)]
    for state_size, dtype, gate, packed in mambas:
        shown = str(dtype).removeprefix("torch.") + " gate" * gate + " packed" * packed
        label = f"sm_{architecture} mamba N={state_size} {shown}"
        yield label, _mamba(state_size, dtype, gate, packed)
    for width in (2, 3, 4) if thorough else (4,):
        label = f"sm_{architecture} short convolution W={width} bfloat16"
        yield label, _short_convolution(width, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        shown = str(dtype).removeprefix("torch.")
        yield f"sm_{architecture} loss and SwiGLU {shown}", _loss_and_mlp(dtype)


def check_all(*, thorough: bool) -> bool:
    """Prints a row for every kernel; False where one would not launch, or spills much."""
    labels, kernels = [], []
    for architecture in _ARCHITECTURES:
        for label, launches in _cases(architecture, thorough):
            for recorded in record(architecture, launches):
                labels.append(label)
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
