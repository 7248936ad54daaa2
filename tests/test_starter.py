"""The rows that a page fetches first, and packages for the web."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import wordfreq
import xxhash
from safetensors.numpy import load_file

import pleexport
from pleexport import targets
from pleexport.errors import BundleError, CheckFailed, InputError, MissingDependencyError
from pleexport.export import starter
from pleexport.export.packaging import package
from pleexport.export.starter import choose_rows, write_starter
from pleexport.runtime.blob import Blob
from pleexport.runtime.tokenizer import open_tokenizer

FOLDER = Path(__file__).parents[1] / "conformance"
BUNDLE = FOLDER / "gemma4-fp32"
# The blob's beginning is a quarter of it.
SHARE = 0.4
TEXT = "In the beginning the word was the word; and Quick brown foxes jump over 13 lazy dogs!\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def web(tmp_path: Path) -> str:
    """The target with a larger share, since the table is small."""
    path = tmp_path / "page.toml"
    shipped = (Path(__file__).parents[1] / "targets" / "web.toml").read_text()
    assert "starter_share = 0.019" in shipped
    path.write_text(shipped.replace("starter_share = 0.019", f"starter_share = {SHARE}"))
    return str(path)


class Rows:
    """What is asked of a blob to choose rows."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows


def ids_of(text: str) -> list[int]:
    tokenizer = open_tokenizer(pleexport.Bundle(BUNDLE).tokenizer_files)
    assert tokenizer is not None
    return tokenizer.encode(text)


def test_a_starter_has_the_rows_that_a_text_uses_most(web: str, text: Path, tmp_path: Path) -> None:
    made = package(BUNDLE, tmp_path / "package", target=web, texts=[text])
    held = load_file(made.path / "starter.safetensors")
    blob, ids = pleexport.Runner(BUNDLE).blob, held["token_ids"]
    first = 16_384 + (made.path / "starter.safetensors").stat().st_size
    table = blob.num_rows * blob.row_stride
    assert SHARE * table - blob.row_stride - 1024 < first <= SHARE * table
    np.testing.assert_array_equal(held["rows"], blob.stored_rows(blob.row_ids(ids)))
    counts = Counter(ids_of(TEXT))
    left_out = set(counts) - set(ids.tolist())
    assert left_out
    own = [counts[i] for i in ids.tolist() if counts[i]]
    assert min(own) >= max(counts[i] for i in left_out)
    covered = sum(own) / counts.total()
    (note,) = [note for note in made.notes if "starter" in note]
    assert f"those of {covered:.1%} of the tokens of the text" in note


def test_a_package_for_the_web_opens_as_a_bundle(web: str, text: Path, tmp_path: Path) -> None:
    made = package(BUNDLE, tmp_path / "package", target=web, texts=[text])
    ids = [1, 5, 9]
    expected = pleexport.Runner(BUNDLE, threads=1).logits(ids)
    np.testing.assert_array_equal(pleexport.Runner(made.path, threads=1).logits(ids), expected)
    assert {file.path for file in made.index.files} == {
        path.name for path in made.path.iterdir() if path.name != "index.json"
    }


def test_the_header_of_a_starter_has_a_checksum(web: str, text: Path, tmp_path: Path) -> None:
    made = package(BUNDLE, tmp_path / "package", target=web, texts=[text])
    data = (made.path / "starter.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    stored = load_file(made.path / "starter.safetensors")["header_checksum"]
    assert xxhash.xxh3_64_intdigest(data[:begin]) == int(stored[0])


def test_a_starter_is_that_of_the_vectors(tmp_path: Path) -> None:
    vectors = Path(__file__).parent / "vectors"
    write_starter(Blob(vectors / "int8.safetensors"), np.array([4, 2, 1]), tmp_path / "starter")
    expected = (vectors / "starter" / "int8.safetensors").read_bytes()
    assert (tmp_path / "starter").read_bytes() == expected


def test_a_starter_is_the_same_when_made_again(web: str, text: Path, tmp_path: Path) -> None:
    made = [package(BUNDLE, tmp_path / name, target=web, texts=[text]) for name in "ab"]
    assert made[0].index.files == made[1].index.files


def test_words_of_a_language_are_counted_without_a_text() -> None:
    bundle = pleexport.Bundle(BUNDLE)
    blob = bundle.open_blob()
    chosen, covered = choose_rows(bundle, blob, count=100)
    assert covered is None
    assert {*ids_of("the"), *ids_of("."), *ids_of("\n")} <= set(chosen.tolist())
    german, _ = choose_rows(bundle, blob, count=100, languages=["de"])
    assert set(german.tolist()) != set(chosen.tolist())
    # Those of two languages hold the most used of each.
    both, _ = choose_rows(bundle, blob, count=100, languages=["en", "de"])
    assert set(chosen[:20].tolist()) <= set(both.tolist())


class Whole:
    """A tokenizer to which every text is one token."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode_prompt(self, text: str) -> list[int]:
        return [self.ids.setdefault(text, len(self.ids))]


def test_words_of_code_and_its_marks_count_as_a_word_of_prose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Whole()
    monkeypatch.setattr(starter, "open_tokenizer", lambda _: tokenizer)
    bundle = pleexport.Bundle(BUNDLE)
    count = 5000
    monkeypatch.setattr(starter, "_always", lambda *_: [])
    blob = cast(Blob, Rows(200_000))
    chosen, _ = choose_rows(bundle, blob, count=count)
    held = {text for text, i in tokenizer.ids.items() if i in set(chosen.tolist())}
    assert len(held) == count
    assert {"return", " return", "://", "()", "\t\t", "\n\n\n", " " * 20, " the", "The"} <= held
    # The control: a rare word is known, and left out.
    words = wordfreq.get_frequency_dict("en", "best")
    rare = f" {list(words)[19_000]}"
    assert rare in tokenizer.ids
    assert rare not in held


def test_what_stands_around_a_message_comes_first(text: Path) -> None:
    names = [path.parent for path in FOLDER.glob("*/manifest.json")]
    with_chat = [b for b in map(pleexport.Bundle, sorted(names)) if b.manifest.chat_format]
    bundle = with_chat[0]
    tokenizer = open_tokenizer(bundle.tokenizer_files)
    assert tokenizer is not None
    assert bundle.manifest.chat_format is not None
    rendered = bundle.manifest.chat_format.render([{"role": "user", "content": "a"}])
    chosen, _ = choose_rows(bundle, bundle.open_blob(), count=60, texts=[text])
    assert set(tokenizer.encode_prompt(rendered)) <= set(chosen.tolist())


def test_a_damaged_row_is_not_handed_on(tmp_path: Path) -> None:
    bundle = pleexport.Bundle(BUNDLE)
    whole = (BUNDLE / "embeddings.safetensors").read_bytes()
    offset = bundle.open_blob().rows_offset + 3
    damaged = whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
    (tmp_path / "embeddings.safetensors").write_bytes(damaged)
    blob = type(bundle.open_blob())(tmp_path / "embeddings.safetensors")
    write_starter(blob, np.array([1, 2]), tmp_path / "good")
    with pytest.raises(CheckFailed, match="the row of token id 0 does not match"):
        write_starter(blob, np.array([1, 0]), tmp_path / "bad")


def test_wrong_input_gets_one_sentence(
    web: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "package"
    with pytest.raises(InputError, match="there are no words of language `tlh`; known: ar, "):
        package(BUNDLE, out, target=web, languages=["tlh"])
    without = next(
        path.parent
        for path in sorted(FOLDER.glob("*/manifest.json"))
        if not pleexport.Bundle(path.parent).tokenizer_files
    )
    with pytest.raises(BundleError, match="has no tokenizer, so nothing tells which rows"):
        package(without, out, target=web, texts=[text])
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(MissingDependencyError, match="told by wordfreq, which is not installed"):
        package(BUNDLE, out, target=web)
    assert not out.exists()


def test_a_starter_is_under_two_hundredths_of_the_table() -> None:
    packs = targets.load("web").packs
    assert packs is not None
    assert packs.starter_share < 0.02
