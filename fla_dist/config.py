"""The whole run as frozen dataclasses, and the strict JSON loader that fills them.

One JSON object describes a run; its sections are the fields of `Config`. The loader walks the
dataclasses: types, ranges and choices are read from the annotations, so a new setting is one
annotated field. Whatever a user can get wrong is a `ConfigError` that names the key's path (or the
file and line), the value, and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A setting that cannot be used; the message names its key and the allowed values."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, written beside its type: `Annotated[int, Range(1)]`."""

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.minimum if self.open_minimum else value >= self.minimum
        return above and value <= self.maximum and math.isfinite(value)

    def __str__(self) -> str:
        lower = f"{'>' if self.open_minimum else '>='} {self.minimum:g}"
        return lower if self.maximum == math.inf else f"{lower} and <= {self.maximum:g}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_minimum=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


# The sections -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    layer_pattern: tuple[str, ...]
    """Mixers of the blocks, repeated until `num_hidden_layers` blocks are named."""
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool = True
    norm_eps: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = 0.02
    mixers: dict[str, Any] = field(default_factory=dict)
    """Each mixer's config, of the class that MIXERS names; its defaults where left out."""

    def __post_init__(self) -> None:
        from fla_dist.models.mixers import MIXERS

        if not self.layer_pattern:
            raise ConfigError("layer_pattern: names no mixer")
        for key, names in (("layer_pattern", self.layer_pattern), ("mixers", self.mixers)):
            for name in names:
                if name not in MIXERS:
                    raise ConfigError(f"{key}: unknown mixer {name!r}{_nearest(name, MIXERS)}")
        mixers = dict(self.mixers)
        for name in dict.fromkeys((*self.layer_pattern, *mixers)):
            given = mixers.get(name, {})
            if isinstance(given, dict):
                mixers[name] = _build(MIXERS[name].config_class, given, f"mixers.{name}")
            if problem := MIXERS[name].problem(self.hidden_size, mixers[name]):
                raise ConfigError(f"mixers.{name}.{problem}")
        object.__setattr__(self, "mixers", mixers)


@dataclass(frozen=True)
class SourceConfig:
    path: str
    """A file, a directory, a glob, a built-in source such as `python-docs:`, or `hf:` and the name
    of a dataset on the Hugging Face hub (or the directory of one)."""
    weight: PositiveFloat = 1.0
    text_field: str = "text"
    template: str | None = None
    """A document of several fields, as in "{title}\\n\\n{text}"; in place of `text_field`."""
    min_characters: PositiveInt = 1
    max_characters: PositiveInt | None = None
    """Documents of other lengths are left out."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Of a dataset on the hub; its newest revision where left out, the same for a whole run."""


@dataclass(frozen=True)
class TokenizerTrainConfig:
    vocab_size: Annotated[int, Range(257)]
    sources: tuple[SourceConfig, ...] = ()
    """Text to train on; `data.sources` where left out."""
    max_bytes: PositiveInt = 50_000_000


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None
    """A `tokenizer.json`, or a directory that holds one."""
    train: TokenizerTrainConfig | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.train is None):
            raise ConfigError("set exactly one of path and train")


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    sequence_length: PositiveInt
    validation_sources: tuple[SourceConfig, ...] = ()
    packing: Literal["documents", "none", "best_fit"] = "documents"
    """`documents`: positions and states restart at each document; `none`: one stream; `best_fit`:
    as `documents`, but documents shorter than a sequence stay whole, and some padding is added."""
    mask_document_ends: bool = True
    """No loss where the next token belongs to another document."""
    seed: NonNegativeInt = 0
    lanes: PositiveInt = 8
    """Streams the sources are dealt to; fixed when a run starts, whatever the number of ranks."""
    on_bad_source: Literal["error", "quarantine"] = "error"
    """`quarantine`: a unit of text that cannot be read counts as empty; logged, and it leaves every
    other unit's order as it was."""
    num_workers: PositiveInt = 1
    """Processes a host that encode text."""
    cache_dir: str = "runs/token_cache"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources: names no source")
        if self.packing == "best_fit" and not self.mask_document_ends:
            raise ConfigError("mask_document_ends: packing best_fit always masks them")


@dataclass(frozen=True)
class TrainingConfig:
    max_tokens: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    global_batch_tokens: PositiveInt | None = None
    seed: NonNegativeInt = 0
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool | Literal["auto"] = "auto"
    """The model's blocks run through torch.compile; `auto`: on a GPU below ZeRO stage 3, whose
    hooks would cut the blocks' graphs."""
    loss_chunks: PositiveInt | Literal["auto"] = "auto"
    z_loss: NonNegativeFloat = 0.0
    max_consecutive_skipped_steps: NonNegativeInt = 5

    def __post_init__(self) -> None:
        if (self.max_tokens is None) == (self.max_steps is None):
            raise ConfigError("set exactly one of max_tokens and max_steps")


@dataclass(frozen=True)
class OptimizerConfig:
    lr: PositiveFloat
    type: Literal["AdamW"] = "AdamW"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only, not to norms, biases and decay parameters."""


@dataclass(frozen=True)
class LRSchedulerConfig:
    type: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_ratio: Fraction | None = None
    warmup_steps: NonNegativeInt | None = None
    min_lr_ratio: Fraction = 0.1
    """The last step's learning rate over the peak's (cosine, wsd)."""
    decay_ratio: Fraction = 0.1
    """The share of all steps in which wsd (warmup, stable, decay) goes down."""

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ConfigError("warmup_ratio and warmup_steps set the same quantity; keep one")


@dataclass(frozen=True)
class ParallelismConfig:
    sequence_parallel_size: PositiveInt = 1
    """Ranks that each sequence is divided over."""
    state_exchange: Literal["auto", "all_gather", "hierarchical"] = "auto"
    """How recurrent states cross ranks; `auto`: hierarchically where sequences span hosts."""
    attention_exchange: Literal["auto", "all_gather", "all_to_all", "ring"] = "auto"
    """How full attention crosses ranks; `auto`: by heads, slice and hosts."""
    exchange_timeout_seconds: PositiveFloat = 600.0
    """An exchange that takes longer ends the run, naming rank, layer and phase."""


@dataclass(frozen=True)
class CheckpointConfig:
    dir: str
    interval_steps: PositiveInt = 500
    keep_latest: PositiveInt = 3
    resume: Literal["auto", "never", "required"] = "auto"
    """`auto`: from the last good checkpoint in `dir`, if any; `required`: refuse to start without
    one; `never`: refuse to start where `dir` holds one."""
    reshard: bool = False
    """Continue a checkpoint of another world size or sequence-parallel size, with the same samples
    in the same order."""


@dataclass(frozen=True)
class EvaluationConfig:
    interval_steps: PositiveInt = 1000
    sequences: PositiveInt = 16
    """Sequences of `data.validation_sources` measured at each length."""
    sequence_lengths: tuple[PositiveInt, ...] = ()
    """Lengths to measure at; `data.sequence_length` where left out."""


@dataclass(frozen=True)
class LoggingConfig:
    dir: str
    interval_steps: PositiveInt = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class TorchAutocastConfig:
    enabled: bool = False
    dtype: Literal["bfloat16"] = "bfloat16"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the linear layers' gradients as ranks sum them at ZeRO 1-3; at ZeRO 3 also of their
    weights as ranks gather them."""


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed's `zero_optimization`; a None leaves DeepSpeed's default."""

    stage: Annotated[int, Range(0, 3)] = 0
    overlap_comm: bool | None = None
    reduce_scatter: bool = True
    contiguous_gradients: bool | None = None
    reduce_bucket_size: PositiveInt | None = None
    allgather_bucket_size: PositiveInt | None = None
    allgather_partitions: bool | None = None
    round_robin_gradients: bool | None = None
    sub_group_size: PositiveInt | None = None
    stage3_prefetch_bucket_size: NonNegativeInt | None = None
    stage3_param_persistence_threshold: NonNegativeInt | None = None
    stage3_max_live_parameters: NonNegativeInt | None = None
    stage3_max_reuse_distance: NonNegativeInt | None = None


@dataclass(frozen=True)
class DeepSpeedConfig:
    train_micro_batch_size_per_gpu: PositiveInt = 1
    """Sequences in a micro batch, shared by the ranks of a sequence-parallel group."""
    gradient_accumulation_steps: PositiveInt | Literal["auto"] = "auto"
    """`auto`: what `training.global_batch_tokens` asks for."""
    gradient_clipping: NonNegativeFloat = 0.0
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    zero_optimization: ZeroConfig = ZeroConfig()


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    evaluation: EvaluationConfig | None = None
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    def __post_init__(self) -> None:
        sp = self.parallelism.sequence_parallel_size
        lengths: dict[str, tuple[int, ...]] = {"data.sequence_length": (self.data.sequence_length,)}
        if self.evaluation:
            lengths["evaluation.sequence_lengths"] = self.evaluation.sequence_lengths
            if not self.data.validation_sources:
                raise ConfigError("evaluation: needs data.validation_sources, which names none")
        for key, values in lengths.items():
            for length in values:
                if length < sp:
                    raise ConfigError(
                        f"{key}: {length} is less than a token for each of "
                        f"parallelism.sequence_parallel_size {sp} ranks"
                    )
        heads = self.model.mixers.get("attention")
        if self.parallelism.attention_exchange == "all_to_all" and heads is not None:
            for key in ("num_heads", "num_kv_heads"):
                if getattr(heads, key) % sp:
                    raise ConfigError(
                        f"parallelism.attention_exchange: all_to_all needs a multiple of "
                        f"sequence_parallel_size ({sp}) as model.mixers.attention.{key}, which is "
                        f"{getattr(heads, key)}"
                    )
        if self.training.compile is True and self.deepspeed.zero_optimization.stage == 3:
            raise ConfigError(
                "training.compile: true does not go with deepspeed.zero_optimization.stage 3, "
                "whose hooks would cut the blocks' graphs; expected false or auto"
            )
        train = self.tokenizer.train
        if train and train.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"tokenizer.train.vocab_size: {train.vocab_size} does not fit in model.vocab_size "
                f"{self.model.vocab_size}"
            )
        accumulation = self.deepspeed.gradient_accumulation_steps
        if (accumulation == "auto") == (self.training.global_batch_tokens is None):
            raise ConfigError(
                "training.global_batch_tokens and deepspeed.gradient_accumulation_steps set the "
                "same quantity: give exactly one (leave the other null or 'auto')"
            )


# The loader ---------------------------------------------------------------------------------------

ELSEWHERE = {
    "deepspeed.train_batch_size": "set by training.global_batch_tokens",
    "deepspeed.optimizer": "set by the section optimizer",
    "deepspeed.scheduler": "set by the section lr_scheduler",
    "deepspeed.sequence_parallel_size": "set by parallelism.sequence_parallel_size",
    "deepspeed.data_parallel_size": "the world size over parallelism.sequence_parallel_size",
    "deepspeed.bf16": "set by deepspeed.torch_autocast, which leaves parameters fp32",
    "deepspeed.fp16": "not offered: deepspeed.torch_autocast trains in bfloat16",
    "deepspeed.tensorboard": "set by the section logging",
    "deepspeed.zero_optimization.offload_optimizer": "not offered",
    "deepspeed.zero_optimization.offload_param": "not offered",
    "training.lr": "set by optimizer.lr",
    "training.sequence_length": "set by data.sequence_length",
    "model.sequence_length": "set by data.sequence_length",
}
"""Keys a user may look for in one place that are set in another."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's JSON file, applies `--section.key value` pairs over it, and checks all of it.

    Raises:
        ConfigError: naming the file and line, or the key's path, and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read: {error}") from error
    try:
        tree = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected an object of sections, got {_show(tree)}")
    _apply_overrides(tree, overrides)
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Checks a tree of plain JSON values, such as a checkpoint holds, and builds the config."""
    return _build(Config, tree, "")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain JSON values; `config_from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"{key}: set twice in the same object")
        result[key] = value
    return result


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    arguments = list(overrides)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"command line: expected --section.key value, got {argument!r}")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not arguments:
                raise ConfigError(f"command line: --{key} has no value")
            value = arguments.pop(0)
        *parents, last = key.split(".")
        node: Any = tree
        for name in parents:
            node = _child(node, name, key)
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        if isinstance(node, list):
            _child(node, last, key)
            node[int(last)] = parsed
        elif isinstance(node, dict):
            node[last] = parsed
        else:
            raise ConfigError(f"command line: --{key}: {'.'.join(parents)} is not a section")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(f"command line: --{key}: {name!r} is not an index below {len(node)}")
        return node[int(name)]
    if not isinstance(node, dict):
        raise ConfigError(f"command line: --{key}: nothing lies below {name!r}")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _build(cls: Any, value: Any, path: str) -> Any:
    """An instance of dataclass `cls` from a JSON object; `path` names it in errors."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, got {_show(value)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in value:
        if key not in fields:
            where = _join(path, key)
            reason = ELSEWHERE.get(where)
            raise ConfigError(
                f"{where}: this quantity is {reason}; remove it here"
                if reason
                else f"{where}: unknown key{_nearest(key, fields)}"
            )
    arguments = {key: _parse(hints[key], item, _join(path, key)) for key, item in value.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ConfigError(f"{_join(path, name)}: missing; expected {_describe(hints[name])}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(_rebase(path, str(error))) from error


def _rebase(path: str, message: str) -> str:
    """Puts an object's path before a message of its own __post_init__, joined to a leading key."""
    if not path:
        return message
    leads_with_key = ":" in message and " " not in message.split(":", 1)[0]
    return f"{path}{'.' if leads_with_key else ': '}{message}"


def _parse(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`, or a ConfigError."""
    origin, arms = typing.get_origin(kind), typing.get_args(kind)
    failure = ConfigError(f"{path}: {_show(value)} is not allowed; expected {_describe(kind)}")
    if origin is Annotated:
        result = _parse(arms[0], value, path) if _is_number(arms[0], value) else None
        if result is None or any(result not in bound for bound in arms[1:]):
            raise failure
        return result
    if origin in (typing.Union, types.UnionType):
        for arm in arms:
            if dataclasses.is_dataclass(arm) and isinstance(value, dict):
                return _build(arm, value, path)
            try:
                return _parse(arm, value, path)
            except ConfigError:
                continue
        raise failure
    if origin is Literal:
        if any(value == arm and type(value) is type(arm) for arm in arms):
            return value
        raise failure
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise failure
        kinds = [arms[0]] * len(value) if arms[-1] is Ellipsis else list(arms)
        if len(kinds) != len(value):
            raise failure
        return tuple(
            _parse(k, v, f"{path}.{i}") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise failure
        return {key: _parse(arms[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if kind is Any:
        return value
    if kind in (int, float) and _is_number(kind, value):
        return kind(value)
    if kind in (str, bool, type(None)) and isinstance(value, kind):
        return value
    raise failure


def _is_number(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (
        kind is float and isinstance(value, float) and math.isfinite(value)
    )


def _describe(kind: Any) -> str:
    origin, arms = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{_describe(arms[0])} {' and '.join(str(bound) for bound in arms[1:])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in arms)
    if origin is Literal:
        return " | ".join(json.dumps(arm) for arm in arms)
    if origin is tuple:
        count = "" if arms[-1] is Ellipsis else f"{len(arms)} of "
        return f"a list of {count}{_describe(arms[0])}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "an object"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, "null")


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(names))}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
