"""A tokenizer.json, loaded or trained here, and the encoding of documents."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fla_dist.config import DataConfig, TokenizerConfig, TokenizerTrainConfig
from fla_dist.data.documents import read_documents
from fla_dist.data.errors import DataError
from fla_dist.data.lease import hold
from fla_dist.data.order import make_key, permute
from fla_dist.data.shard import write_atomically
from fla_dist.data.sources import Source, resolve_sources
from fla_dist.data.words import WordEncoder, encodes_words

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
TRAINING_VERSION = 1

# A document is encoded in parts of about this many characters, for the encoder's memory grows to
# over a hundred times a text's size; a part ends where the encoding of its surroundings shows that
# no token and no rule of the tokenizer reaches over the cut.
PART_CHARACTERS = 1 << 19
SURROUNDINGS_CHARACTERS = 256
CUTS_TRIED = 16
CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?=\s)")
BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Tokenizer:
    """Attributes:
    path: of the tokenizer.json, kept in the cache.
    sha256: of that file.
    vocab_size: one more than the largest id.
    end_of_document: the id put after each document; None if the tokenizer knows no such token.
    """

    backend: tokenizers.Tokenizer
    path: Path
    sha256: str
    vocab_size: int
    end_of_document: int | None

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuses a tokenizer whose ids a model of `vocab_size` has no embedding for."""
        if self.vocab_size > vocab_size:
            raise DataError(
                f"tokenizer: {self.path} has {self.vocab_size} tokens, more than model.vocab_size "
                f"{vocab_size}"
            )

    @functools.cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder(self.backend, self.dtype) if encodes_words(self.backend) else None

    def encode_documents(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Each document's ids, its end included, in this tokenizer's dtype."""
        encoded: list[np.ndarray] = []
        end = np.array([] if self.end_of_document is None else [self.end_of_document], self.dtype)
        open_parts: list[np.ndarray] = []
        for batch in _batches(self._parts(documents)):
            results = self._encode_parts([text for text, _ in batch])
            for (_, is_last), ids in zip(batch, results, strict=True):
                open_parts.append(ids)
                if is_last:
                    encoded.append(np.concatenate([*open_parts, end]))
                    open_parts = []
        return encoded

    def _encode_parts(self, texts: list[str]) -> list[np.ndarray]:
        words = self._words
        encoded = [None if words is None else words.encode(text) for text in texts]
        others = [text for text, ids in zip(texts, encoded, strict=True) if ids is None]
        results = iter(self.backend.encode_batch_fast(others, add_special_tokens=False))
        return [
            np.array(next(results).ids, self.dtype)
            if ids is None
            else np.frombuffer(ids, self.dtype)
            for ids in encoded
        ]

    def _parts(self, documents: Sequence[str]) -> Iterator[tuple[str, bool]]:
        """(text, whether it is its document's last part)."""
        for document in documents:
            start = 0
            while len(document) - start > PART_CHARACTERS:
                cut = self._safe_cut(document, start + PART_CHARACTERS)
                if cut is None:
                    break
                yield document[start:cut], False
                start = cut
            yield document[start:], True

    def _safe_cut(self, document: str, near: int) -> int | None:
        tried = 0
        for match in CUT.finditer(document, near):
            cut = match.start()
            before = document[max(0, cut - SURROUNDINGS_CHARACTERS) : cut]
            after = document[cut : cut + SURROUNDINGS_CHARACTERS]
            if self.encode(before) + self.encode(after) == self.encode(before + after):
                return cut
            tried += 1
            if tried == CUTS_TRIED:
                break
        return None


def load_tokenizer(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """Loads the tokenizer, or trains it once; other processes wait. Kept under data.cache_dir.

    Raises:
        DataError: naming the config key or the file.
    """
    if config.train is not None:
        return open_tokenizer(_trained(config.train, data))
    assert config.path is not None
    path = Path(config.path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer.path: {file}: {error.strerror}") from error
    # Builders read a copy, so that a run has one tokenizer whatever happens to the user's file.
    settings_file = file.with_name("tokenizer_config.json")
    settings = settings_file.read_bytes() if settings_file.exists() else b"{}"
    digest = hashlib.sha256(content + settings).hexdigest()[:32]
    kept = Path(data.cache_dir) / "tokenizers" / digest
    if not (kept / "tokenizer.json").exists():
        kept.mkdir(parents=True, exist_ok=True)
        write_atomically(kept / "tokenizer_config.json", [settings])
        write_atomically(kept / "tokenizer.json", [content])
    try:
        return open_tokenizer(kept / "tokenizer.json")
    except DataError as error:
        raise DataError(f"tokenizer.path: {file}: {error}") from error


def open_tokenizer(path: Path) -> Tokenizer:
    """Opens a tokenizer.json and, beside it, the tokenizer_config.json that names its end token."""
    content = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"not a tokenizer.json: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError("not a tokenizer.json: its vocabulary is empty")
    settings_file = path.with_name("tokenizer_config.json")
    named = None
    if settings_file.exists():
        named = json.loads(settings_file.read_text()).get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
    ends = [vocabulary[end] for end in (named, *KNOWN_ENDS) if end in vocabulary]
    end = ends[0] if ends else None
    return Tokenizer(
        backend=backend,
        path=path,
        sha256=hashlib.sha256(content + str(end).encode()).hexdigest(),
        vocab_size=max(vocabulary.values()) + 1,
        end_of_document=end,
    )


def _trained(config: TokenizerTrainConfig, data: DataConfig) -> Path:
    key = "tokenizer.train.sources" if config.sources else "data.sources"
    sources = resolve_sources(
        config.sources or data.sources, key, plans=Path(data.cache_dir) / "plans"
    )
    identity = [
        TRAINING_VERSION,
        config.vocab_size,
        config.max_bytes,
        [[source.weight, source.units.sha256(moved=False)] for source in sources],
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    directory = Path(data.cache_dir) / "tokenizers" / digest
    path = directory / "tokenizer.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with hold(directory / "lease"):
            if not path.exists():
                write_atomically(path, [train_bpe(config, sources).encode()])
    return path


def train_bpe(config: TokenizerTrainConfig, sources: Sequence[Source]) -> str:
    """Trains a byte-level BPE on up to `max_bytes` of the sources' text; its JSON."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_text(config, sources), trainer)
    return backend.to_str()


def _training_text(config: TokenizerTrainConfig, sources: Sequence[Source]) -> Iterator[str]:
    """Each source's share of `max_bytes`, from units all over the source."""
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        left = int(config.max_bytes * source.weight / total_weight)
        units = permute(np.arange(len(source.units)), len(source.units), make_key("tokenizer"))
        documents = (text for unit in units.tolist() for text in read_documents(source.units[unit]))
        for document in documents:
            if left <= 0:
                break
            part = document[:left]
            left -= len(part.encode())
            yield part


def _batches(parts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
