"""Words encoded alone give what the tokenizer makes of the whole text."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fla_dist.data import words
from fla_dist.data.words import _SPLITS, WordEncoder, encodes_words

from .conftest import DOCUMENTS

ALPHABET = "abS tre 'll  \t\n\n\r\v\x1c.,;(_-<|>=&09é…\u00a0\u2028世\u0301٣"
MIXED = (
    "Grüße an Zoë's\u00a0 'tis  café.\n\n   for i in range(10):\r\n\t\treturn  self._x  # …, 3٣4\n"
)


def byte_level(regex: str | None) -> pre_tokenizers.PreTokenizer:
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """With so many merges for so little text, no cut is right by chance."""
    spaces = ("".join(characters) + "a" for characters in product(" \n\u00a0", repeat=4))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*spaces, MIXED, ALPHABET, *DOCUMENTS[:6]], trainer)
    return backend


@pytest.fixture(scope="module", params=[None, *_SPLITS], ids=["GPT-2", "three digits", "a digit"])
def backend(request) -> Tokenizer:
    return train(byte_level(request.param))


def check(encoder: WordEncoder, backend: Tokenizer, text: str) -> bool:
    ids = encoder.encode(text)
    expected = backend.encode(text, add_special_tokens=False).ids
    assert ids is None or np.frombuffer(ids, np.uint16).tolist() == expected, text
    return ids is not None


@given(text=st.text(st.sampled_from(ALPHABET), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text(backend, text):
    check(WordEncoder(backend, "uint16"), backend, text)


def test_real_text(backend, monkeypatch):
    monkeypatch.setattr(words, "KNOWN_WORDS", 100)
    encoder = WordEncoder(backend, "uint16")
    for _ in range(2):
        assert all(check(encoder, backend, text) for text in [MIXED, *DOCUMENTS])
    assert 0 < len(encoder._known) <= 100


def test_what_cannot_be_cut_is_left_to_the_tokenizer(backend):
    encoder = WordEncoder(backend, "uint16")
    assert encoder.encode("not the <|endoftext|> yet") is None
    assert encoder.encode("世界 Grüße") is None


def test_which_tokenizers_encode_words(backend):
    assert encodes_words(backend)
    cuts_elsewhere = train(byte_level(r"\s+|\S+"))
    prefixed = train(pre_tokenizers.ByteLevel(add_prefix_space=True))
    backend.add_tokens([AddedToken("<wide>", lstrip=True)])
    assert not any(map(encodes_words, (cuts_elsewhere, prefixed, Tokenizer(models.BPE()))))
    assert WordEncoder(backend, "uint16").encode("a <wide>") is None
