from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fla_dist.benchmark.step import KEY, add_row, covered, kind_of, synthetic_batch
from fla_dist.parallel.mesh import Mesh


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>",
            "matrix products",
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_tem_fused_flex_attention_backward_12", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("summarize_gradient_kernel", "scan"),
        ("backward_kernel", "scan"),
        ("short_convolution_backward_kernel", "convolution"),
        ("losses_kernel", "loss"),
        ("swiglu_backward_kernel", "norm and pointwise"),
        ("triton_red_fused_add_mul_3", "norm and pointwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::...>",
            "norm and pointwise",
        ),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor...>", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "exchange"),
        ("Memset (Device)", "norm and pointwise"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_overlapping_kernels_count_once() -> None:
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_slices_of_a_synthetic_batch_continue_its_documents() -> None:
    batch = synthetic_batch(2, 19, 37, 6, Mesh(1, 2, 2))
    assert batch.positions[1].tolist() == [4, 5, 0, 1, 2, 3, 4, 5, 0]
    assert batch.doc_ids[1].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_a_row_replaces_one_of_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "models_gpu.json"
    environment = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit"), "x")
    first = dict.fromkeys(KEY, 1)
    for row in (first | {"mfu": 0.1}, first | {"batch_size": 2}, first | {"mfu": 0.2}):
        add_row(path, row, environment)
    assert [row.get("mfu") for row in json.loads(path.read_text())["rows"]] == [None, 0.2]
    add_row(path, first, environment | {"gpu": "y"})
    assert len(json.loads(path.read_text())["rows"]) == 1
