"""The typed config as a DeepSpeed engine, and the proof that its gradients have the right scale.

Each rank's loss is a sum over its own tokens. With N_valid the valid tokens of all ranks and all
micro batches of a step, the engine is handed

    factor · gradient_accumulation_steps · Σ_local loss / N_valid

where the factor undoes DeepSpeed's averaging over ranks, which differs between ZeRO stages (at 0
gradients are summed here). A wrong factor trains, since Adam hides it, but clips wrongly. So before
training a small engine of the same settings takes one step whose gradient is known, and a run whose
DeepSpeed averages otherwise is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fla_dist.config import Config, ZeroConfig
from fla_dist.models import LanguageModel
from fla_dist.models.initialization import Uninitialized
from fla_dist.parallel.deepspeed_mpu import DeepSpeedMPU
from fla_dist.parallel.mesh import Mesh
from fla_dist.training.distributed import RunError, sum_over_ranks
from fla_dist.training.gradients import GradientSum
from fla_dist.training.metrics import HostCopy
from fla_dist.training.optimizer import build_optimizer
from fla_dist.training.plan import BatchPlan

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

deepspeed.utils.logger.setLevel(logging.ERROR)
# torch tells DeepSpeed, at every call, of collectives that were renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

# DeepSpeed compiles a shared-memory all-reduce when it finds a compiler (34 s on two cores). An
# empty list of compatible ops makes it keep to torch.distributed; it reads the list nowhere else.
deepspeed.ops.__compatible_ops__ = {}


class StepResult:
    """What an optimizer step did. Who reads it waits for the backward's end.

    Args:
        grad_norm: before clipping; a step without a finite one is skipped.
        applied: what DeepSpeed knows of that.
    """

    def __init__(self, grad_norm: Tensor | float, applied: bool) -> None:
        self._grad_norm = HostCopy(torch.as_tensor(grad_norm))
        self._applied = applied

    @property
    def grad_norm(self) -> float:
        return self._grad_norm.item()

    @property
    def applied(self) -> bool:
        return self._applied and math.isfinite(self.grad_norm)


class Engine:
    """A model under DeepSpeed: forward, backward and step of one rank."""

    def __init__(
        self, model: nn.Module, config: Config, plan: BatchPlan, mesh: Mesh, device: torch.device
    ) -> None:
        self._loss_scale = (
            loss_factor(config.deepspeed.zero_optimization, mesh) * plan.gradient_accumulation_steps
        )
        settings = deepspeed_settings(config, plan)
        clips_itself = config.deepspeed.zero_optimization.stage == 0
        max_norm = config.deepspeed.gradient_clipping if clips_itself else None
        if clips_itself:
            settings["gradient_clipping"] = 0.0  # left out, DeepSpeed would clip to 1 before
        model.to(device)
        optimizer = build_optimizer(model, config.optimizer, max_norm=max_norm)
        self.deepspeed, self._gradient_sum = _initialize(model, optimizer, settings, config, mesh)

    def loss(self, batch: Any) -> Tensor:
        """The sum of the token losses of this rank's slice."""
        return self.deepspeed(batch)

    def backward(self, loss: Tensor, valid_tokens: float) -> None:
        """Accumulates the gradient of `loss` over the step's valid tokens on all ranks."""
        self.deepspeed.backward(loss * (self._loss_scale / valid_tokens))

    def step(self, lr: float | None = None) -> StepResult | None:
        """Ends a micro batch; at the last of a step, updates the weights with `lr`."""
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last and lr is not None:
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = lr
        if last and self._gradient_sum:
            self._gradient_sum.finish()
        self.deepspeed.step()
        if not last:
            return None
        return StepResult(self.deepspeed.get_global_grad_norm(), self.deepspeed.was_step_applied())


def build_model(config: Config, mesh: Mesh, device: torch.device) -> LanguageModel:
    """The run's model with its first weights, not yet on `device`."""
    training = config.training
    compiled = training.compile
    if compiled == "auto":
        compiled = device.type == "cuda" and config.deepspeed.zero_optimization.stage < 3
    with Uninitialized():
        model = LanguageModel(
            config.model,
            mesh=mesh,
            activation_checkpointing=training.activation_checkpointing,
            loss_chunks=training.loss_chunks,
            z_loss=training.z_loss,
            compiled=compiled,
        )
    model.initialize(training.seed)
    return model


def deepspeed_settings(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's JSON. It counts batches in sequences, whatever ranks share one."""
    section = config.deepspeed
    zero = dataclasses.asdict(section.zero_optimization)
    autocast = dataclasses.asdict(section.torch_autocast)
    if autocast.pop("reduce_dtype") == "float32":
        autocast["lower_precision_safe_modules"] = []  # whose gradients it would sum in `dtype`
    return {
        "train_batch_size": plan.sequences_per_step,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": section.gradient_clipping,
        "torch_autocast": autocast,
        "zero_optimization": {key: value for key, value in zero.items() if value is not None},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def loss_factor(zero: ZeroConfig, mesh: Mesh) -> int:
    """What the sum over ranks is divided by, by ZeRO stage."""
    if zero.stage == 0:
        return 1
    whole_world = zero.stage == 3 and zero.reduce_scatter
    return mesh.world_size if whole_world else mesh.data_parallel_size


class _Probe(nn.Module):
    """A loss that is linear in its weights, so that its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_whole = nn.Parameter(torch.zeros(4))
        self.partitioned = nn.Parameter(torch.zeros(8, 8))

    def forward(self, scale: Tensor) -> Tensor:
        return scale * (self.kept_whole.sum() + 2 * self.partitioned.sum())


def verify_gradient_scale(
    config: Config, mesh: Mesh, device: torch.device, *, factor: int | None = None
) -> None:
    """Takes one step of a small engine with the run's own DeepSpeed settings and compares the
    weights' change and the reported norm with their closed form.

    Raises:
        RunError: on every rank, where they differ.
    """
    zero = config.deepspeed.zero_optimization
    factor = loss_factor(zero, mesh) if factor is None else factor
    accumulation = 2
    probe_config = dataclasses.replace(config.deepspeed, gradient_clipping=1e6)
    plan = BatchPlan(
        world_size=mesh.world_size,
        sequence_parallel_size=mesh.sequence_parallel_size,
        data_parallel_size=mesh.data_parallel_size,
        micro_batch_size=1,
        gradient_accumulation_steps=accumulation,
        sequences_per_step=accumulation * mesh.data_parallel_size,
        tokens_per_step=1,
        total_steps=1,
    )
    settings = deepspeed_settings(dataclasses.replace(config, deepspeed=probe_config), plan)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 16
    probe = _Probe().to(device)
    kept_whole, partitioned = probe.kept_whole, probe.partitioned
    optimizer = torch.optim.SGD(probe.parameters(), lr=1.0)
    engine, gradient_sum = _initialize(probe, optimizer, settings, config, mesh)

    valid_tokens = 10.0
    inputs = [float(mesh.rank + 1 + micro_step) for micro_step in range(accumulation)]
    for value in inputs:
        loss = engine(torch.tensor(value, device=device))
        engine.backward(loss * (factor * accumulation / valid_tokens))
        if gradient_sum and engine.is_gradient_accumulation_boundary():
            gradient_sum.finish()
        engine.step()
    expected = sum_over_ranks([sum(inputs)], torch.device("cpu"))[0] / valid_tokens
    with deepspeed.zero.GatheredParameters([kept_whole, partitioned], enabled=zero.stage == 3):
        found = {
            "a gradient": -kept_whole.detach().mean().item(),
            "a partitioned gradient": -partitioned.detach().mean().item() / 2,
        }
    norm = engine.get_global_grad_norm()
    if norm is not None:
        found["the gradient's norm"] = float(norm) / (4 + 4 * 64) ** 0.5
    engine.destroy()
    for what, value in found.items():
        if abs(value - expected) > 0.01 * expected:
            raise RunError(
                f"DeepSpeed {deepspeed.__version__} at ZeRO {zero.stage} gives {what} "
                f"{value / expected:.4g} times its true value with {mesh.world_size} ranks and "
                f"sequence_parallel_size {mesh.sequence_parallel_size}: refusing to train"
            )


def _initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    config: Config,
    mesh: Mesh,
) -> tuple[Any, GradientSum | None]:
    """DeepSpeed's engine; with ZeRO 0, what sums gradients over ranks in its stead."""
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings,
        mpu=DeepSpeedMPU(mesh),
        dist_init_required=False,
    )
    if config.deepspeed.zero_optimization.stage > 0:
        return engine, None
    engine.enable_backward_allreduce = False
    if mesh.world_size == 1:
        return engine, None
    autocast = config.deepspeed.torch_autocast
    narrow = autocast.enabled and autocast.reduce_dtype == "bfloat16"
    return engine, GradientSum(
        model.parameters(),
        engine.is_gradient_accumulation_boundary,
        torch.bfloat16 if narrow else None,
    )
