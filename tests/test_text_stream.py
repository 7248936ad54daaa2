"""Text that streams is the text that `decode` gives, for whatever ids a model writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_world_tokenizer import published_vocabulary
from tokenizers_in_code import KINDS, byte_fallback, save

from pleexport.runtime.stopping import AnswerText
from pleexport.runtime.text_stream import clean
from pleexport.runtime.tokenizer import Tokenizer, tokenizer_files

SEQUENCES = 1500


def opened(folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_files(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    cleaning = {"clean_up_tokenization_spaces": True}
    made = {kind: save(make(), root / kind, **cleaning) for kind, make in KINDS.items()}
    return made | {"world": published_vocabulary()}


def random_ids(generator: random.Random, top: int, most: int = 14) -> list[int]:
    """Ids of any kind; some have no token, and many are bytes."""
    return [generator.randrange(top) for _ in range(generator.randrange(most))]


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("kind", [*KINDS, "world"])
def test_pieces_of_any_ids_join_to_what_decode_says(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = opened(folders[kind])
    generator = random.Random(kind)
    for top in (20, 300):
        for _ in range(SEQUENCES):
            ids = random_ids(generator, top)
            assert "".join(streamed(tokenizer, ids, [])) == tokenizer.decode(ids), ids


def test_a_stream_that_does_not_wait_for_runs_is_caught(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pleexport.runtime.json_tokenizer.JsonTokenizer._is_byte", lambda *_: False)
    with pytest.raises(AssertionError):
        test_pieces_of_any_ids_join_to_what_decode_says("byte fallback", folders)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace", "suffixes"])
def test_pieces_go_on_from_a_prompt(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = opened(folders[kind])
    generator = random.Random(kind)
    prompt = tokenizer.encode("ab a")
    for _ in range(SEQUENCES):
        ids = random_ids(generator, 300)
        joined = "".join(streamed(tokenizer, ids, prompt))
        assert tokenizer.decode(prompt) + joined == tokenizer.decode(prompt + ids), ids


def test_a_prompt_that_ends_inside_a_character_is_not_said_again(folders: dict[str, Path]) -> None:
    for kind in ("byte level", "byte fallback"):
        tokenizer = opened(folders[kind])
        euro = [i for i in tokenizer.encode("a€") if i != 2]
        assert "".join(streamed(tokenizer, euro[-1:], euro[:-1])) == "\ufffd"


def bytes_of(tokenizer: Tokenizer, *values: int) -> list[int]:
    return [4 + value for value in values]


def test_a_run_of_bytes_waits_for_its_end(tmp_path: Path) -> None:
    tokenizer = opened(save(byte_fallback(), tmp_path))
    a = tokenizer.encode("a")[-1]
    whole, broken = bytes_of(tokenizer, 0xC3, 0xA9), bytes_of(tokenizer, 0xC3, 0xA9, 0xFF)
    assert streamed(tokenizer, [*whole, a], []) == ["", "", "éa", ""]
    assert streamed(tokenizer, [*broken, a], []) == ["", "", "", "\ufffd\ufffd\ufffda", ""]
    assert streamed(tokenizer, broken, []) == ["", "", "", "\ufffd\ufffd\ufffd"]
    # A special token is no end: `decode` passes it over.
    assert streamed(tokenizer, [whole[0], 1, whole[1], a], []) == ["", "", "", "éa", ""]


def test_whole_characters_do_not_wait(folders: dict[str, Path]) -> None:
    for kind in ("byte level", "byte fallback"):
        tokenizer = opened(folders[kind])
        ids = [i for i in tokenizer.encode("aba") if i != 2]
        assert all(piece for piece in streamed(tokenizer, ids, [])[:-1])


def test_a_stop_string_is_found_in_what_was_held_back(tmp_path: Path) -> None:
    tokenizer = opened(save(byte_fallback(), tmp_path))
    text = AnswerText(tokenizer.stream([]), ["é"])
    pieces = [text.push(i) for i in [tokenizer.encode("a")[-1], *bytes_of(tokenizer, 0xC3, 0xA9)]]
    assert not text.stopped
    assert ["".join(pieces), text.flush(), text.stopped] == ["a", "", True]


def test_cleaning_is_that_of_the_original() -> None:
    from transformers import PreTrainedTokenizerBase

    generator = random.Random(0)
    parts = [" ", " ", ".", ",", "!", "?", "'", "n't", "'s", "'ve", "'re", "'m", "n", "ab", "don"]
    for _ in range(3000):
        text = "".join(generator.choices(parts, k=10))
        assert clean(text) == PreTrainedTokenizerBase.clean_up_tokenization(None, text)
