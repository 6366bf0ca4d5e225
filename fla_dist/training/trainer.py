"""One pretraining run, from its config to its last checkpoint."""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from types import FrameType
from typing import Literal

import torch
import torch.distributed as dist

from fla_dist.config import Config, config_to_dict
from fla_dist.data import Batch, TokenPipeline, build_pipeline
from fla_dist.data.batch import IGNORED_LABEL
from fla_dist.training.checkpoint import Checkpoints, TrainingState
from fla_dist.training.distributed import (
    RunError,
    mesh_of,
    process_group,
    raise_first,
    sum_over_ranks,
    together,
)
from fla_dist.training.engine import Engine, build_model, verify_gradient_scale
from fla_dist.training.metrics import HostCopy, PhaseTimer, Records, StepRecord, memory_peaks
from fla_dist.training.optimizer import learning_rate
from fla_dist.training.plan import plan_batches

EXIT_FINISHED = 0
EXIT_STOPPED_BY_SIGNAL = 75
"""All ranks saved after SIGTERM or SIGUSR1 and left; start the same command again to go on."""

CPU = torch.device("cpu")


def pretrain(config: Config) -> int:
    """Trains to the end, or to a signal; returns this process's exit code."""
    with process_group(config.parallelism) as device, ExitStack() as resources:
        return Trainer(config, device, resources).train()


class Trainer:
    """The state of a run, and its loop. What it opens is closed by `resources`."""

    def __init__(self, config: Config, device: torch.device, resources: ExitStack) -> None:
        self.started = time.perf_counter()
        self.config, self.device = config, device
        self.stop_requested = False
        self.plan = plan_batches(config, dist.get_world_size())
        self.mesh = mesh_of(config.parallelism)
        verify_gradient_scale(config, self.mesh, device)
        self.pipeline = together(lambda: self._build_pipeline(config.data.sequence_length, "train"))
        resources.callback(self.pipeline.close)
        tokenizer = self.pipeline.tokenizer
        together(lambda: tokenizer.require_vocabulary(config.model.vocab_size))
        torch.manual_seed(config.training.seed)
        model = build_model(config, self.mesh, device)
        flops_per_token = model.flops_per_token(config.data.sequence_length)
        self.engine = Engine(model, config, self.plan, self.mesh, device)
        self.checkpoints = Checkpoints(config, self.plan, tokenizer.path)
        self.state = self._resume()
        self.consecutive_skipped_steps = 0
        self.validation_batches: dict[int, list[Batch]] = {}
        self.timer = PhaseTimer(device)
        self.records = Records(
            config.logging,
            self.plan,
            self.mesh,
            flops_per_token=flops_per_token,
            first_step=self.state.step,
        )
        resources.callback(self.records.close)
        if self.mesh.rank == 0:
            about = {"plan": asdict(self.plan), "config": config_to_dict(config)}
            (self.records.jsonl.parent / "run.json").write_text(json.dumps(about, indent=1))

    def train(self) -> int:
        """Trains from where the run stands; returns an exit code."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request_stop)
        first_step = self.state.step
        while self.state.step < self.plan.total_steps:
            begin = time.perf_counter()
            batches, valid_tokens = self._next_batches()
            stop = self._train_step(batches, valid_tokens, begin)
            step, last = self.state.step, self.state.step == self.plan.total_steps
            if step == first_step + 1:
                waited = time.perf_counter() - self.started
                self.records.say(f"first step done {waited:.1f} s after the start")
            if step % self.config.logging.interval_steps == 0 or last or stop:
                self.records.report()
            evaluation = self.config.evaluation
            if evaluation and not stop and (step % evaluation.interval_steps == 0 or last):
                self.records.validation(step, self._validate())
            if step % self.config.checkpoint.interval_steps == 0 or last or stop:
                saved = self.checkpoints.save(self.engine, self.state)
            if stop:
                self.records.say(f"stopped by a signal at step {step}; saved {saved}")
                return EXIT_STOPPED_BY_SIGNAL
        self.records.say(f"finished {self.plan.total_steps} steps, {self.state.tokens:,} tokens")
        return EXIT_FINISHED

    def _next_batches(self) -> tuple[list[Batch], float]:
        """This rank's micro batches of a step, and the valid tokens of all ranks in them."""
        begin = time.perf_counter()
        batches: list[Batch] = []
        failure = None
        try:
            for _ in range(self.plan.gradient_accumulation_steps):
                batches.append(next(self.pipeline))
        except (ValueError, OSError) as error:
            failure = str(error)
        self.timer.add("data", time.perf_counter() - begin)
        valid = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        valid_tokens, failed = self._agree([valid, failure is not None])
        if failed:
            failures: list[str | None] = [None] * self.mesh.world_size
            dist.all_gather_object(failures, failure)
            raise_first(failures)
        return batches, valid_tokens

    def _train_step(self, batches: list[Batch], valid_tokens: float, begin: float) -> bool:
        """Forward, backward and update; returns whether some rank was asked to stop."""
        state, timer = self.state, self.timer
        lr = learning_rate(
            state.step, self.plan.total_steps, self.config.optimizer.lr, self.config.lr_scheduler
        )
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            with timer("forward"):
                loss = self.engine.loss(batch.to(self.device, non_blocking=True))
            with timer("backward"):
                self.engine.backward(loss, max(valid_tokens, 1.0))
            loss_sum += loss.detach()
            loss_copy = HostCopy(loss_sum)
            with timer("optimizer"):
                result = self.engine.step(lr)
        assert result is not None
        local_loss = loss_copy.item()
        total_loss, stops = self._agree([local_loss, self.stop_requested])

        state.step += 1
        state.tokens += self.plan.tokens_per_step
        state.data = self.pipeline.state_dict()
        state.skipped_steps += not result.applied
        seconds = time.perf_counter() - begin
        phases = timer.read()
        self.records.write(
            StepRecord(
                step=state.step,
                tokens=state.tokens,
                loss=total_loss / max(valid_tokens, 1.0),
                lr=lr,
                grad_norm=result.grad_norm,
                applied=result.applied,
                skipped_steps=state.skipped_steps,
                local_loss_finite=local_loss == local_loss and abs(local_loss) != float("inf"),
                step_seconds=seconds,
                data_seconds=phases["data"],
                forward_seconds=phases["forward"],
                backward_seconds=phases["backward"],
                optimizer_seconds=phases.get("optimizer", 0.0),
                communication_wait_seconds=phases["communication_wait"],
                quarantined_units=self.pipeline.quarantined_units,
                tokens_per_second_per_gpu=self.plan.tokens_per_step
                / seconds
                / self.mesh.world_size,
                **memory_peaks(self.device),
            )
        )
        self._check_skipped(result.applied)
        return stops > 0

    def _check_skipped(self, applied: bool) -> None:
        """Counts steps in a row whose gradient was not finite; too many end the run."""
        self.consecutive_skipped_steps = 0 if applied else self.consecutive_skipped_steps + 1
        if applied:
            return
        self.records.say(
            f"step {self.state.step}: the gradient is not finite; the step was skipped"
        )
        allowed = self.config.training.max_consecutive_skipped_steps
        if self.consecutive_skipped_steps > allowed:
            raise RunError(
                f"{self.consecutive_skipped_steps} steps in a row had a gradient that is not "
                f"finite (training.max_consecutive_skipped_steps {allowed}); the last checkpoint "
                f"is {self.checkpoints.newest() or 'none'}"
            )

    @torch.no_grad()
    def _validate(self) -> dict[int, float]:
        """The mean token loss over the first validation sequences, by sequence length."""
        evaluation = self.config.evaluation
        assert evaluation is not None
        losses = {}
        self.engine.deepspeed.eval()
        for length in evaluation.sequence_lengths or (self.config.data.sequence_length,):
            batches = self.validation_batches.get(length)
            if batches is None:
                batches = together(partial(self._read_validation, length, evaluation.sequences))
                self.validation_batches[length] = batches
            loss_sum, valid = 0.0, 0
            for batch in batches:
                loss_sum += self.engine.loss(batch.to(self.device)).item()
                valid += int((batch.labels != IGNORED_LABEL).sum())
            total, valid_tokens = sum_over_ranks([loss_sum, valid], CPU)
            losses[length] = total / max(valid_tokens, 1.0)
        self.engine.deepspeed.train()
        return losses

    def _read_validation(self, length: int, sequences: int) -> list[Batch]:
        """The first validation sequences, the same number of micro batches on every rank."""
        pipeline = self._build_pipeline(length, "validation")
        try:
            micro_batch = self.plan.micro_batch_size * self.plan.data_parallel_size
            return list(islice(pipeline, max(1, sequences // micro_batch)))
        finally:
            pipeline.close()

    def _build_pipeline(
        self, sequence_length: int, split: Literal["train", "validation"]
    ) -> TokenPipeline:
        return build_pipeline(
            replace(self.config.data, sequence_length=sequence_length),
            self.config.tokenizer,
            data_parallel_rank=self.mesh.data_parallel_rank,
            data_parallel_size=self.mesh.data_parallel_size,
            sequence_parallel_rank=self.mesh.sequence_parallel_rank,
            sequence_parallel_size=self.mesh.sequence_parallel_size,
            micro_batch_size=self.plan.micro_batch_size,
            split=split,
        )

    def _resume(self) -> TrainingState:
        state = self.checkpoints.restore(self.engine)
        if state is None:
            return TrainingState()
        together(lambda: self.pipeline.load_state_dict(state.data))
        return state

    def _agree(self, values: list[float]) -> list[float]:
        """Sums over the ranks; the time is what this rank waits for the slowest."""
        begin = time.perf_counter()
        totals = sum_over_ranks(values, CPU)
        self.timer.add("communication_wait", time.perf_counter() - begin)
        return totals

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
