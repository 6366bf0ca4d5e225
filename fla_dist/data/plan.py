"""What a run reads: its resolved sources, its tokenizer, and the cache between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fla_dist.config import DataConfig
from fla_dist.data.builder import Builder
from fla_dist.data.cache import TokenCache
from fla_dist.data.errors import DataError
from fla_dist.data.sources import Source, resolve_sources
from fla_dist.data.tokenizer import Tokenizer
from fla_dist.data.units import Unit

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Plan:
    """Attributes:
    sha256: of its files' names and sizes and how they are cut, not of their place.
    """

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    cache: TokenCache
    sha256: str

    @staticmethod
    def make(data: DataConfig, tokenizer: Tokenizer, split: Split) -> Plan:
        """Resolves a split's sources.

        Raises:
            DataError: naming the config key or the file.
        """
        key = "data.validation_sources" if split == "validation" else "data.sources"
        configs = data.validation_sources if split == "validation" else data.sources
        sources = tuple(resolve_sources(configs, key, plans=Path(data.cache_dir) / "plans"))
        if not sources:
            raise DataError(f"{key}: names no source")
        cache = TokenCache(Path(data.cache_dir), tokenizer.sha256, data.on_bad_source)
        return Plan(sources, tokenizer, cache, _hash(sources))

    def units(self) -> Iterator[Unit]:
        return (unit for source in self.sources for unit in source.units)

    def num_units(self) -> int:
        return sum(len(source.units) for source in self.sources)

    def make_builder(self, units: Callable[[], Iterable[Unit]], num_workers: int) -> Builder:
        """A builder of all units, in the order in which `units` gives them."""
        return Builder(
            self.cache,
            self.tokenizer,
            units,
            num_workers=num_workers,
            plan=f"{self.sha256[:16]}-{self.tokenizer.sha256[:16]}",
        )


def _hash(sources: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(json.dumps([source.weight, source.units.sha256(moved=True)]).encode())
    return digest.hexdigest()
