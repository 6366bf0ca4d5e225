"""Kernels compiled ahead of time on a machine without a GPU."""

from dataclasses import replace

import torch

from fla_dist.benchmark import compile_cases, compile_check
from fla_dist.benchmark.compile_check import compile_all, record
from fla_dist.kernels.common.segments import fold_op


def fold():
    state = torch.empty(1, 3, 2, 16, 16)
    fold_op.function(torch.empty(1, 3, 2, 1, 1), state, None, False)


def test_a_kernel_compiles_for_both_architectures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [(recorded, cc) for cc in (80, 90) for recorded in record(cc, fold)]
    rows = list(compile_all(kernels, 2))
    assert [(row.kernel, row.architecture) for row in rows] == [
        ("fold_kernel", 80),
        ("fold_kernel", 90),
    ]
    assert all(row.registers > 0 and row.problem == "" for row in rows)


def test_every_case_records_its_kernels():
    found = {}
    for label, launches in compile_cases._cases(90, False):
        names = {recorded.kernel.fn.__name__ for recorded in record(90, launches)}
        found.setdefault(label.split()[0], set()).update(names)
    scan = {"forward_kernel", "backward_kernel"}
    assert found["hgrn"] == scan and "backward_kernel" in found["mamba"]
    assert {"prepare_kernel", "pair_gradient_kernel", "fold_kernel"} < found["gla"]
    walks = {"value_kernel", "key_kernel", "decay_gradient_kernel", "fold_kernel"}
    assert walks < found["simple_gla"]
    chunks = {"walk_kernel", "output_kernel", "value_gradient_kernel", "shared_gradient_kernel"}
    assert chunks < found["mamba2"]


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_check, "SHARED_MEMORY_BYTES", {90: -1})
    monkeypatch.setattr(compile_check, "SPILLED_BYTES", -1)
    (recorded,) = record(90, fold)
    (row,) = compile_all([(replace(recorded, registers=None), 90)], 1)
    assert "shared memory" in row.problem
    monkeypatch.setattr(compile_check, "SHARED_MEMORY_BYTES", {90: 1 << 20})
    (row,) = compile_all([(recorded, 90)], 1)
    assert "spilled" in row.problem
