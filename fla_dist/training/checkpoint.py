"""Checkpoints that are whole or not there: written beside, summed, renamed.

    <dir>/step_00000500/      DeepSpeed's files, state.json, tokenizer.json, manifest.json
    <dir>/latest              the name of the newest, written last
    <dir>/partial_step_…      one that was being written when the run ended; never read
    <dir>/deleted_step_…      one that was being deleted then; never read
    <dir>/universal_step_…    one in DeepSpeed's universal form, while other ranks are given it

`state.json` is what DeepSpeed does not know: the step, the data's position and the config.
`manifest.json` has each file's size and sha256. A checkpoint that differs from its manifest is
named, and the one before is taken. The directory must be one that all hosts see.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fla_dist.config import CheckpointConfig, Config, config_to_dict
from fla_dist.training.distributed import RunError, together
from fla_dist.training.engine import Engine
from fla_dist.training.plan import BatchPlan

STEP, PARTIAL, DELETED, UNIVERSAL = "step_", "partial_", "deleted_", "universal_"
STAGE = "deepspeed.zero_optimization.stage"
MANIFEST, STATE, TOKENIZER = "manifest.json", "state.json", "tokenizer.json"


@dataclass
class TrainingState:
    """Where a run stands, the same on every rank."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    data: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run; every method is collective."""

    def __init__(self, config: Config, plan: BatchPlan, tokenizer: Path) -> None:
        self.dir = Path(config.checkpoint.dir)
        self._tokenizer = tokenizer
        self._settings: CheckpointConfig = config.checkpoint
        self._config = config_to_dict(config)
        self._layout = {
            "world_size": plan.world_size,
            "parallelism.sequence_parallel_size": plan.sequence_parallel_size,
            STAGE: config.deepspeed.zero_optimization.stage,
        }
        self._rank = dist.get_rank()

    def save(self, engine: Engine, state: TrainingState) -> Path:
        """Writes a checkpoint and deletes the oldest beyond `keep_latest`."""
        name = f"{STEP}{state.step:08d}"
        final, partial = self.dir / name, self.dir / (PARTIAL + name)
        if self._rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            for prefix in (PARTIAL, DELETED):
                for leftover in self.dir.glob(f"{prefix}*"):
                    shutil.rmtree(leftover)
        dist.barrier()
        engine.deepspeed.save_checkpoint(
            self.dir, tag=partial.name, client_state={"rng": _rng_state()}, save_latest=False
        )
        if self._rank == 0:
            content = {**asdict(state), "layout": self._layout, "config": self._config}
            (partial / STATE).write_text(json.dumps(content, indent=1))
            shutil.copyfile(self._tokenizer, partial / TOKENIZER)
        dist.barrier()
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, {p.name: _digest(p, sync=True) for p in _share(partial)})
        if self._rank == 0:
            files = {name: digest for share in shares for name, digest in share.items()}
            _write_synced(partial / MANIFEST, json.dumps(files, indent=1))
            if final.exists():
                _delete(final)
            os.replace(partial, final)
            _write_synced(self.dir / "latest.new", name)
            os.replace(self.dir / "latest.new", self.dir / "latest")
            for old in self._names()[self._settings.keep_latest :]:
                _delete(self.dir / old)
        dist.barrier()
        return final

    def restore(self, engine: Engine) -> TrainingState | None:
        """Loads the newest whole checkpoint; None where there is none.

        Raises:
            RunError: `checkpoint.resume` forbids what was found, every checkpoint is damaged, or it
                is of another model or layout of ranks.
        """
        listing = [self._names() if self._rank == 0 else None]
        dist.broadcast_object_list(listing)
        names: list[str] = listing[0] or []
        if self._settings.resume == "never" and names:
            raise RunError(
                f"checkpoint.dir: {self.dir} holds {names[0]} and checkpoint.resume is 'never'; "
                "name another directory or set resume to 'auto'"
            )
        damages = []
        for name in names:
            damage = self._damage(self.dir / name)
            if damage is None:
                return self._load(engine, name)
            damages.append(f"{self.dir / name} is damaged: {damage}")
            if self._rank == 0:
                print(f"warning: checkpoint {damages[-1]}; trying the one before", flush=True)
        if damages:
            raise RunError(
                f"no checkpoint in {self.dir} is whole; {damages[0]}. Nothing was deleted."
            )
        if self._settings.resume == "required":
            raise RunError(
                f"checkpoint.dir: {self.dir} holds no checkpoint; checkpoint.resume is 'required'"
            )
        return None

    def newest(self) -> Path | None:
        """The last checkpoint that was written."""
        return next((self.dir / name for name in self._names()), None)

    def _names(self) -> list[str]:
        """Names of the checkpoints, newest first."""
        return sorted((path.name for path in self.dir.glob(f"{STEP}*")), reverse=True)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's files, each read by one rank; the same on all ranks."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, _first_damage(path))
        return next((damage for damage in found if damage), None)

    def _load(self, engine: Engine, name: str) -> TrainingState:
        content = json.loads((self.dir / name / STATE).read_text())
        model = self._config["model"]
        if differing := _differences(content["config"]["model"], model, "model"):
            raise RunError(f"checkpoint {self.dir / name} is of another model: {differing}")
        if differing := _differences(content["layout"], self._layout, ""):
            same_stage = content["layout"][STAGE] == self._layout[STAGE]
            if not (self._settings.reshard and same_stage):
                way = f"; checkpoint.reshard true continues it at the same {STAGE}"
                raise RunError(
                    f"checkpoint {self.dir / name} was written by another layout of ranks: "
                    f"{differing}{way}"
                )
            self._load_resharded(engine, name)
        else:
            _, client_state = engine.deepspeed.load_checkpoint(self.dir, tag=name)
            _set_rng_state(client_state["rng"])
        return TrainingState(
            content["step"], content["tokens"], content["skipped_steps"], content["data"]
        )

    def _load_resharded(self, engine: Engine, name: str) -> None:
        """Loads weights and optimizer of a checkpoint that other ranks wrote. What a rank keeps for
        itself, the state of its random numbers, starts anew."""
        if self._layout[STAGE] == 0:  # nothing is divided
            engine.deepspeed.load_checkpoint(self.dir, tag=name)
            return
        universal = f"{UNIVERSAL}{name}"
        together(lambda: self._make_universal(name, universal) if self._rank == 0 else None)
        optimizer = engine.deepspeed.optimizer.optimizer
        own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        settings = engine.deepspeed._config
        settings.load_universal_checkpoint = True
        engine.deepspeed.load_checkpoint(self.dir, tag=universal)
        settings.load_universal_checkpoint = False
        # At ZeRO 3 DeepSpeed gives all groups the weight decay of the first, and all parameters
        # one tensor as their count of steps, which each of them then raises.
        for group, settings_of_group in zip(optimizer.param_groups, own, strict=True):
            group.update(settings_of_group)
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        dist.barrier()
        if self._rank == 0:
            _delete(self.dir / universal)

    def _make_universal(self, name: str, universal: str) -> None:
        from deepspeed.checkpoint import ds_to_universal

        partial = self.dir / (PARTIAL + universal)
        for leftover in (partial, self.dir / universal):
            shutil.rmtree(leftover, ignore_errors=True)
        arguments = argparse.Namespace(
            input_folder=str(self.dir / name),
            output_folder=str(partial),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            # The universal form asks for the model's parallelism, which only Megatron writes.
            inject_missing_state=True,
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                ds_to_universal.main(arguments)
        except Exception as error:
            raise OSError(f"checkpoint {self.dir / name} cannot be resharded: {error}") from error
        (self.dir / "latest_universal").unlink()  # DeepSpeed's own pointer
        os.replace(partial, self.dir / universal)


def find_checkpoint(path: Path) -> Path:
    """`path` where it is a whole checkpoint, or the newest whole one in it.

    Raises:
        RunError: there is none, or the one named is damaged.
    """
    if not any((path / name).exists() for name in (MANIFEST, STATE)):
        whole = (p for p in sorted(path.glob(f"{STEP}*"), reverse=True) if not _first_damage(p, 1))
        newest = next(whole, None)
        if newest is None:
            raise RunError(f"{path} holds no whole checkpoint")
        return newest
    if damage := _first_damage(path, 1):
        raise RunError(f"checkpoint {path} is damaged: {damage}")
    return path


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a checkpoint, fp32 on the CPU, and the config that it holds."""
    config = json.loads((path / STATE).read_text())["config"]
    if config["deepspeed"]["zero_optimization"]["stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(path.parent), path.name), config
    content = torch.load(
        path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )
    return content["module"], config


def _share(path: Path, ranks: int | None = None) -> list[Path]:
    """The files of a checkpoint that this rank sums."""
    files = sorted(p for p in path.iterdir() if p.name != MANIFEST)
    return files if ranks == 1 else files[dist.get_rank() :: dist.get_world_size()]


def _first_damage(path: Path, ranks: int | None = None) -> str | None:
    """The first difference of a checkpoint from its manifest, in this rank's share of the files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    missing = sorted(name for name in manifest if not (path / name).exists())
    if missing:
        return f"{missing[0]} is missing"
    for file in _share(path, ranks):
        expected = manifest.get(file.name)
        if expected and expected != _digest(file):
            return f"{file.name} is not what was written (size or sha256 differ)"
    return None


def _digest(path: Path, *, sync: bool = False) -> dict[str, Any]:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            sha256.update(block)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256.hexdigest()}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _delete(path: Path) -> None:
    """Renames first, so that a crash on the way leaves nothing that looks like a checkpoint."""
    condemned = path.with_name(DELETED + path.name)
    os.replace(path, condemned)
    shutil.rmtree(condemned)


def _differences(there: dict[str, Any], here: dict[str, Any], path: str) -> str:
    """The first keys whose values differ, as text."""
    found = []
    for key in sorted({*there, *here}):
        a, b, name = there.get(key), here.get(key), f"{path}.{key}" if path else key
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(_differences(a, b, name))
        elif a != b:
            found.append(f"{name} is {json.dumps(a)} there and {json.dumps(b)} here")
    return "; ".join([text for text in found if text][:3])


def _rng_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
