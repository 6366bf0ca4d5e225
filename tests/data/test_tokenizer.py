"""Tokenizers: trained once and always the same, cut without a trace, refused when bad."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from fla_dist.config import DataConfig, SourceConfig, TokenizerConfig
from fla_dist.data import DataError, load_tokenizer
from fla_dist.data import tokenizer as tokenizer_module

from .conftest import DOCUMENTS, TOKENIZER


@pytest.fixture
def trained(data_config: DataConfig):
    return load_tokenizer(TOKENIZER, data_config)


def test_documents_round_trip(trained):
    texts = [*DOCUMENTS, "Grüße, 世界 \U0001f30d\r\n\t end", " ", "<|endoftext|>"]
    encoded = trained.encode_documents(texts)
    assert trained.vocab_size == 512 and trained.dtype == "uint16"
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.dtype == np.uint16 and ids[-1] == trained.end_of_document
        assert trained.decode(ids[:-1].tolist()) == text


def test_training_is_deterministic_and_cached(trained, data_config, tmp_path):
    again = load_tokenizer(TOKENIZER, replace(data_config, cache_dir=str(tmp_path)))
    assert again.sha256 == trained.sha256
    modified = again.path.stat().st_mtime_ns
    cached = load_tokenizer(TOKENIZER, replace(data_config, cache_dir=str(tmp_path)))
    assert cached.path.stat().st_mtime_ns == modified


def test_processes_train_it_once(data_config, tmp_path):
    program = (
        "import sys; from fla_dist.config import *; from fla_dist.data import load_tokenizer\n"
        "from fla_dist.data import tokenizer as t; from pathlib import Path\n"
        "train = t.train_bpe\n"
        "def counted(*arguments):\n"
        "    import os; Path(sys.argv[1], f'trained-{os.getpid()}').touch()\n"
        "    return train(*arguments)\n"
        "t.train_bpe = counted\n"
        "c = TokenizerConfig(train=TokenizerTrainConfig(vocab_size=400))\n"
        "d = DataConfig(sources=(SourceConfig('python-docs:'),), sequence_length=8,"
        " cache_dir=sys.argv[1])\n"
        "print(load_tokenizer(c, d).sha256)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=60)[0] for process in processes}
    assert len(printed) == 1 and len(printed.pop()) == 65
    assert len(list(tmp_path.glob("trained-*"))) == 1


def test_long_documents_are_cut_without_a_trace(trained, monkeypatch):
    document = "\n\n".join(DOCUMENTS[:20])
    (whole,) = trained.encode_documents([document])
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 300)
    assert len(list(trained._parts([document]))) > 50
    cut = trained.encode_documents([document, "x", document])
    assert np.array_equal(cut[0], whole) and np.array_equal(cut[2], whole)
    spaceless = "x" * 1000
    assert list(trained._parts([spaceless])) == [(spaceless, True)]


def make_word_tokenizer(path: Path, words: list[str]) -> None:
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(path))


def test_a_tokenizer_of_one_s_own(data_config, tmp_path):
    make_word_tokenizer(tmp_path / "words" / "tokenizer.json", ["?", "a", "b", "STOP"])
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "STOP"}')
    data = replace(data_config, cache_dir=str(tmp_path / "cache"))
    named = load_tokenizer(TokenizerConfig(path=str(tmp_path / "words")), data)
    assert [ids.tolist() for ids in named.encode_documents(["a b a b", "b"])] == [
        [1, 2, 1, 2, 3],
        [2, 3],
    ]
    (tmp_path / "words" / "tokenizer_config.json").unlink()
    path = TokenizerConfig(path=str(tmp_path / "words" / "tokenizer.json"))
    endless = load_tokenizer(path, data)
    assert endless.end_of_document is None and endless.sha256 != named.sha256
    assert endless.encode_documents(["a b"])[0].tolist() == [1, 2]


def test_large_vocabularies_take_four_bytes(data_config, tmp_path):
    make_word_tokenizer(tmp_path / "tokenizer.json", [f"w{i}" for i in range((1 << 16) + 1)])
    loaded = load_tokenizer(TokenizerConfig(path=str(tmp_path)), data_config)
    assert loaded.encode_documents(["w65536"])[0].dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.path: .*tokenizer\.json: No such file"),
        ("{", r"tokenizer\.path: .*not a tokenizer\.json"),
        (json.dumps({"version": "1.0"}), r"tokenizer\.path: .*not a tokenizer\.json"),
    ],
)
def test_bad_tokenizers(data_config, tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    data = replace(data_config, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=message):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)), data)


def test_bad_text_to_train_on(data_config, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\n")
    train = replace(TOKENIZER.train, sources=(SourceConfig(str(tmp_path / "a.txt")),))
    data = replace(data_config, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"tokenizer\.train\.sources\.0: .*a\.txt:2: byte 5"):
        load_tokenizer(TokenizerConfig(train=train), data)
