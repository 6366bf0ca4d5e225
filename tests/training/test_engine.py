"""DeepSpeed at every ZeRO stage with sequence parallelism against plain PyTorch on one process.

Loss, gradient norm and the weights after two clipped steps, for every layer pattern and for
documents that lie in every way across the ranks.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fla_dist.config import Config, TorchAutocastConfig, ZeroConfig
from fla_dist.models import LanguageModel
from fla_dist.parallel.mesh import Mesh, build_mesh
from fla_dist.training.distributed import RunError, sum_over_ranks
from fla_dist.training.engine import Engine, loss_factor, verify_gradient_scale
from fla_dist.training.optimizer import parameter_groups
from fla_dist.training.plan import plan_batches
from tests.models.tiny import tiny_config
from tests.packing import LENGTH, STARTS, PackedTokens, packed_tokens
from tests.parallel.ranks import run_ranks
from tests.training.tiny import tiny_run

WORLD = 4
CPU = torch.device("cpu")
VOCABULARY = 37
SETTINGS: dict[str, Any] = {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1}
"""With so large an eps AdamW's step is smooth in the gradient, and a wrong scale shows."""
CLIPPING = 0.1
STEPS = 2
ZEROS = {
    "0": ZeroConfig(stage=0),
    "1": ZeroConfig(stage=1),
    "2": ZeroConfig(stage=2),
    "3": ZeroConfig(stage=3, stage3_param_persistence_threshold=40),
    "3, reduce_scatter false": ZeroConfig(
        stage=3, reduce_scatter=False, stage3_param_persistence_threshold=40
    ),
}
PATTERNS = ("samba", "gla", "attention")
SIZES = (1, 2, 4)
MIXED = [name for name in STARTS if name != "document open before the sequence"]
Outcome = dict[str, Any]


def prepare_rank() -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # which a launcher sets, and DeepSpeed asks for


def batch_of(starts: list[str], step: int) -> PackedTokens:
    """The four sequences of a step."""
    return packed_tokens([STARTS[name] for name in starts], VOCABULARY, seed=step)


def expected_outcome(pattern: str, starts: list[str]) -> Outcome:
    """Plain PyTorch, one process, no accumulation."""
    model = LanguageModel(tiny_config(pattern))
    model.initialize(seed=0)
    groups = parameter_groups(model, SETTINGS["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["lr"], betas=(0.9, 0.95), eps=1e-2)
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_of(starts, step)
        loss = model(batch) / (batch.labels != -100).sum()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIPPING).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": weights_of(model, 0)}


def engine_outcome(pattern: str, zero: ZeroConfig, mesh: Mesh, starts: list[str]) -> Outcome:
    """The same over the mesh: each data-parallel rank takes its sequences one by one."""
    accumulation = len(starts) // mesh.data_parallel_size
    config = tiny_run(
        tiny_config(pattern),
        sequence_length=LENGTH,
        sequence_parallel_size=mesh.sequence_parallel_size,
        zero=zero,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=CLIPPING,
        **SETTINGS,
    )
    model = LanguageModel(config.model, mesh=mesh)
    model.initialize(seed=0)
    engine = Engine(model, config, plan_batches(config, mesh.world_size), mesh, CPU)
    losses, norms = [], []
    for step in range(STEPS):
        whole = batch_of(starts, step)
        valid = float((whole.labels != -100).sum())
        total = 0.0
        for micro_step in range(accumulation):
            row = micro_step * mesh.data_parallel_size + mesh.data_parallel_rank
            fields = (whole.tokens, whole.labels, whole.positions, whole.doc_ids)
            sequence = PackedTokens(*(field[row : row + 1] for field in fields))
            loss = engine.loss(
                sequence.slice(mesh.sequence_parallel_rank, mesh.sequence_parallel_size)
            )
            engine.backward(loss, valid)
            result = engine.step(SETTINGS["lr"])
            total += loss.item()
        assert result is not None and result.applied
        losses.append(sum_over_ranks([total], CPU)[0] / valid)
        norms.append(result.grad_norm)
    outcome = {"losses": losses, "norms": norms, "weights": weights_of(model, zero.stage)}
    engine.deepspeed.destroy()
    return outcome


def weights_of(model: nn.Module, stage: int) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def errors_of(got: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative errors; the weights' in units of how far they moved."""
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(got["losses"], expected["losses"], strict=True)),
        "norm": max(abs(a / b - 1) for a, b in zip(got["norms"], expected["norms"], strict=True)),
        "weights": max(
            (got["weights"][name] - weight).abs().max().item()
            for name, weight in expected["weights"].items()
        )
        / (SETTINGS["lr"] * STEPS),
    }


def run_cases(cases: list[tuple[str, str, int, str]]) -> dict[Any, dict[str, float]]:
    prepare_rank()
    meshes = {size: build_mesh(size) for size in SIZES if size <= dist.get_world_size()}
    expected: dict[Any, Outcome] = {}
    errors = {}
    for pattern, zero, size, starts in cases:
        names = MIXED if starts == "mixed" else [starts] * 4
        if (pattern, starts) not in expected:
            expected[pattern, starts] = expected_outcome(pattern, names)
        got = engine_outcome(pattern, ZEROS[zero], meshes[size], names)
        errors[pattern, zero, size, starts] = errors_of(got, expected[pattern, starts])
    return errors


def check(all_errors: list[dict[Any, dict[str, float]]]) -> None:
    wrong = {
        case: errors
        for of_rank in all_errors
        for case, errors in of_rank.items()
        if not max(errors.values()) < 2e-5 or any(math.isnan(e) for e in errors.values())
    }
    assert not wrong


def test_every_stage_and_size_equals_plain_pytorch() -> None:
    """Every stage at every size, and every pattern at every stage and at every size; all three
    together in the slow tests."""
    first, *others = PATTERNS
    cases = list(product([first], ZEROS, SIZES, ["mixed"]))
    for shift, pattern in enumerate(others):
        for i, zero in enumerate(ZEROS):
            cases.append((pattern, zero, SIZES[(i + shift) % len(SIZES)], "mixed"))
    check(run_ranks(WORLD, run_cases, cases))


@pytest.mark.slow
def test_one_rank_without_zero_equals_plain_pytorch() -> None:
    check(run_ranks(1, run_cases, [("gla", "0", 1, "mixed")]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pattern", [*PATTERNS, "all"])
def test_every_stage_size_and_layout_of_documents(pattern: str) -> None:
    check(run_ranks(WORLD, run_cases, list(product([pattern], ZEROS, SIZES, STARTS))))


def probe_messages() -> dict[Any, str | None]:
    """What the probe says of the right factor, and of a wrong one."""
    prepare_rank()
    messages: dict[Any, str | None] = {}
    for size in SIZES:
        mesh = build_mesh(size)
        for name, zero in ZEROS.items():
            config = tiny_run(
                tiny_config("gla"),
                sequence_length=LENGTH,
                sequence_parallel_size=size,
                zero=zero,
                gradient_accumulation_steps=1,
            )
            right = loss_factor(zero, mesh)
            for factor in (right, 2 * right):
                messages[size, name, factor == right, factor] = probe_message(config, mesh, factor)
    return messages


def probe_message(config: Config, mesh: Mesh, factor: int) -> str | None:
    try:
        verify_gradient_scale(config, mesh, CPU, factor=factor)
    except RunError as error:
        return str(error)
    return None


def test_the_probe_accepts_the_right_factor_and_only_that() -> None:
    for messages in run_ranks(WORLD, probe_messages):
        for (size, zero, right, factor), message in messages.items():
            if right:
                assert message is None, (size, zero, factor, message)
            else:
                assert message is not None and "refusing to train" in message, (size, zero, factor)


class _OneWeight(nn.Module):
    """A loss whose gradient by the weight is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum().float()


def summed_gradients() -> dict[tuple[int, str], float]:
    """The norm of a gradient of 256 on one rank and 1 on the other, never clipped; bf16 has no
    257."""
    prepare_rank()
    mesh = build_mesh(1)
    norms = {}
    for stage, dtype in product(range(4), ("float32", "bfloat16")):
        config = tiny_run(tiny_config("gla"), sequence_length=LENGTH, zero=ZeroConfig(stage=stage))
        autocast = TorchAutocastConfig(enabled=True, reduce_dtype=dtype)
        config = replace(config, deepspeed=replace(config.deepspeed, torch_autocast=autocast))
        engine = Engine(_OneWeight(), config, plan_batches(config, mesh.world_size), mesh, CPU)
        engine.backward(engine.loss(torch.full((1, 1), (256.0, 1.0)[mesh.rank])), 1.0)
        result = engine.step(0.01)
        assert result is not None
        norms[stage, dtype] = result.grad_norm
        engine.deepspeed.destroy()
    return norms


def test_gradients_of_autocast_are_summed_in_the_dtype_that_is_set() -> None:
    for norms in run_ranks(2, summed_gradients):
        for (stage, dtype), norm in norms.items():
            assert (norm == 257) == (dtype == "float32"), (stage, dtype, norm)


def skipped_steps() -> dict[str, tuple[list[bool], bool]]:
    """Three steps, the second with a gradient that is not finite on one rank only."""
    prepare_rank()
    mesh = build_mesh(2)
    outcomes = {}
    for name, zero in ZEROS.items():
        config = tiny_run(
            tiny_config("gla"), sequence_length=LENGTH, sequence_parallel_size=2, zero=zero
        )
        model = LanguageModel(config.model, mesh=mesh)
        model.initialize(seed=0)
        engine = Engine(model, config, plan_batches(config, mesh.world_size), mesh, CPU)
        batch = batch_of(MIXED[:1], 0).slice(mesh.sequence_parallel_rank, 2)
        applied = []
        for step in range(3):
            loss = engine.loss(batch)
            if step == 1 and mesh.rank == 1:
                loss = loss * math.nan
            engine.backward(loss, 40.0)
            result = engine.step(0.01)
            assert result is not None
            applied.append(result.applied)
        finite = all(w.isfinite().all() for w in weights_of(model, zero.stage).values())
        outcomes[name] = (applied, bool(finite))
        engine.deepspeed.destroy()
    return outcomes


def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks() -> None:
    for outcomes in run_ranks(2, skipped_steps):
        assert outcomes == {name: ([True, False, True], True) for name in ZEROS}
