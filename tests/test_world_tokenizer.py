"""The World tokenizer against the one of the package `rwkv`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_checkpoints import rwkv

import pleexport
from pleexport.errors import CheckpointError, TokenizerError
from pleexport.runtime.tokenizer import open_tokenizer, tokenizer_files
from pleexport.runtime.world_tokenizer import VOCABULARY, WorldTokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.  12345\n\n\tdef f(x):",
    "Füße, naïve, Ελληνικά, русский, العربية, हिन्दी, 中文字符, 日本語, 한국어",
    "👩‍👩‍👧‍👦 e\u0301 \x00\x7f \u2028 \U0010ffff",
    " " * 300,
]


def published_vocabulary() -> Path:
    spec = importlib.util.find_spec("rwkv")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / VOCABULARY


@pytest.fixture(scope="module")
def original() -> Any:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(published_vocabulary()))


@pytest.fixture(scope="module")
def tokenizer() -> WorldTokenizer:
    return WorldTokenizer(published_vocabulary())


@pytest.mark.parametrize("text", SENTENCES)
def test_ids_are_those_of_the_package(text: str, original: Any, tokenizer: WorldTokenizer) -> None:
    ids = tokenizer.encode(text)
    assert ids == original.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream([])
    assert "".join(stream.push(i) for i in ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(original: Any, tokenizer: WorldTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == original.encode(text)
    assert tokenizer.decode(ids) == text


def test_incomplete_characters_wait(tokenizer: WorldTokenizer) -> None:
    stream = tokenizer.stream([])
    # Ids 1 to 256 are the single bytes.
    assert [stream.push(byte + 1) for byte in "é".encode()] == ["", "é"]
    assert tokenizer.stream([]).push(0) == ""


def test_a_bundle_takes_the_vocabulary_along(tmp_path: Path) -> None:
    checkpoint = rwkv(tmp_path / "model.pth", "7a", vocab=65536, width=16, head_size=8, de_rank=4)
    bundle = pleexport.build(
        checkpoint, tmp_path / "bundle", tokenizer=published_vocabulary(), verify=False
    )
    tokenizer = open_tokenizer(tokenizer_files(bundle.path))
    assert tokenizer is not None
    assert tokenizer.encode("Hello") == [33155]
    assert list(pleexport.Runner(bundle).generate("Hello", max_new_tokens=3))
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json or"):
        pleexport.build(checkpoint, tmp_path / "other", tokenizer=tmp_path / "no", verify=False)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "1 'a' 1",
        "x",
        "1 'a' 2",
        "1 __import__('os') 1",
        "1 3 1",
        "1 'a",
        "a 'a' 1",
        r"1 '\y' 2",
    ],
)
def test_a_malformed_vocabulary_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / VOCABULARY).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=VOCABULARY):
        WorldTokenizer(tmp_path / VOCABULARY)
