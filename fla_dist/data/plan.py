"""What a run reads: its resolved sources, its tokenizer, and the cache between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fla_dist.config import DataConfig
from fla_dist.data.builder import Builder
from fla_dist.data.cache import TokenCache
from fla_dist.data.errors import DataError
from fla_dist.data.sources import Source, Unit, resolve_sources
from fla_dist.data.tokenizer import Tokenizer

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
        sources = tuple(resolve_sources(configs, key))
        if not sources:
            raise DataError(f"{key}: names no source")
        cache = TokenCache(Path(data.cache_dir), tokenizer.sha256)
        return Plan(sources, tokenizer, cache, _hash(sources))

    def units(self) -> Iterator[Unit]:
        return (unit for source in self.sources for unit in source.units)

    def make_builder(self, units: Iterable[Unit], num_workers: int) -> Builder:
        """A builder of `units`, of which the first ones are needed first."""
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
        digest.update(json.dumps([source.weight, len(source.units)]).encode())
        for unit in source.units:
            digest.update(json.dumps(unit.identity(moved=True)).encode())
    return digest.hexdigest()
