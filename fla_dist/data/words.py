"""Encoding word by word, where words that were seen before are not encoded again.

The usual byte-level tokenizers cut a text by a regular expression into pieces and encode each of
them alone. No piece goes on from an ASCII letter or digit to another ASCII character, nor from
other whitespace to the one space before what is none, and no look-ahead sees beyond such a place.
So a text may be cut there, and most of the words that this gives are words seen before.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import Any

import tokenizers

_OTHERS = r"\x00-/:-@\[-`{-\x7f"  # ASCII but no letter or digit
WORD = re.compile(rf"[{_OTHERS}]*[ \t\n\v\f\r](?= [!-~])|[{_OTHERS}]*[^{_OTHERS}]+|[{_OTHERS}]+")
LONGEST_KNOWN_WORD = 32
KNOWN_WORDS = 1 << 18  # tens of megabytes
LARGEST_BYTES_A_CHARACTER = 1.25
_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class WordEncoder:
    """The ids of texts, as of `backend`, which must be one that `encodes_words` accepts.

    Args:
        dtype: uint16 or uint32.
    """

    def __init__(self, backend: tokenizers.Tokenizer, dtype: str):
        self._known = _KnownWords(backend, {"uint16": "H", "uint32": "I"}[dtype])
        added = backend.get_added_tokens_decoder().values()
        self._added = [token.content for token in added]

    def encode(self, text: str) -> bytes | None:
        """The ids' bytes; None for a text that spells an added token, where a cut could lie, or is
        mostly of other scripts than ASCII's, which have few cuts."""
        if any(token in text for token in self._added):
            return None
        words = WORD.findall(text)
        if not text.isascii():
            if len(text.encode()) > LARGEST_BYTES_A_CHARACTER * len(text):
                return None
            words = _join_at_ascii(words)
        return b"".join(map(self._known.__getitem__, words))


class _KnownWords(dict[str, bytes]):
    def __init__(self, backend: tokenizers.Tokenizer, typecode: str):
        self._backend = backend
        self._typecode = typecode

    def __missing__(self, word: str) -> bytes:
        ids = array(self._typecode, self._backend.encode(word, add_special_tokens=False).ids)
        encoded = ids.tobytes()
        if len(word) <= LONGEST_KNOWN_WORD:
            if len(self) == KNOWN_WORDS:
                self.clear()
            self[word] = encoded
        return encoded


def _join_at_ascii(words: list[str]) -> list[str]:
    """Words that end in ASCII, of words that may end in another character."""
    joined, parts = [], []
    for word in words:
        parts.append(word)
        if word[-1].isascii():
            joined.append("".join(parts))
            parts = []
    return [*joined, "".join(parts)] if parts else joined


def encodes_words(backend: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer is known to encode each word of a text alone."""
    spec = json.loads(backend.to_str())
    return (
        spec["normalizer"] is None
        and not spec["model"].get("dropout")
        and _cuts_as_known(spec["pre_tokenizer"])
    )


def _cuts_as_known(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": regex},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return regex in _SPLITS
    return False
