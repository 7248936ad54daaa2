"""Sampling filters against their definitions; text that streams in whole characters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_in_code import byte_fallback, byte_level, save

from pleexport.errors import InputError, TokenizerError
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.json_tokenizer import JsonTokenizer
from pleexport.runtime.logit_rules import LogitRules
from pleexport.runtime.sampling import Sampling
from pleexport.runtime.stopping import StopStrings
from pleexport.runtime.tokenizer import Tokenizer as Text
from pleexport.runtime.tokenizer import open_tokenizer, tokenizer_files

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], dtype=np.float32))


def drawn(sampling: Sampling) -> set[int]:
    generator = np.random.default_rng(0)
    return {sampling.choose(LOGITS, generator) for _ in range(400)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {0}),
        (Sampling(temperature=1.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.7), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.76), {0, 1, 2}),
        (Sampling(temperature=1.0, min_p=0.2), {0, 1, 2}),
        (Sampling(temperature=0.01), {0}),
    ],
)
def test_filters_keep_what_they_say(sampling: Sampling, expected: set[int]) -> None:
    assert drawn(sampling) == expected


def test_repetition_penalty_pushes_seen_tokens_down() -> None:
    config = GenerationConfig(repetition_penalty=5.0)
    rules = LogitRules(config, prompt_ids=[0], eos=frozenset(), max_length=9)
    assert rules.apply(LOGITS, [0, 0]).argmax() == 1


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(), tmp_path_factory.mktemp("tokenizer"))


@given(text=st.text(max_size=12), prompt=st.text(alphabet="abc é", max_size=5))
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(
    folder: Path, text: str, prompt: str
) -> None:
    tokenizer = Text(tokenizer_files(folder))
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    stream = tokenizer.stream(before)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(text=st.text(alphabet="abEND", max_size=30), cuts=st.lists(st.integers(1, 5), max_size=30))
def test_stop_strings_are_found_across_any_cut(text: str, cuts: list[int]) -> None:
    stops, shown, rest = StopStrings(["END", "aab"]), "", text
    for cut in [*cuts, len(text) + 1]:
        shown += stops.push(rest[:cut])
        rest = rest[cut:]
        if stops.hit:
            break
    found = [at for stop in ("END", "aab") if (at := text.find(stop)) >= 0]
    assert stops.hit == bool(found)
    if found:
        assert text.startswith(shown)
        assert "END" not in shown
        assert "aab" not in shown
    else:
        assert shown + stops.flush() == text


def with_config(folder: Path, tmp_path: Path, **config: object) -> Text:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Text(tokenizer_files(tmp_path))


def test_a_chat_template_is_rendered(folder: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}model:{% endif %}"
    )
    text = with_config(folder, tmp_path, chat_template=template, bos_token="<bos>")
    ids = text.encode_chat([{"role": "user", "content": "hi"}])
    assert text.decode(ids) == "user:himodel:"
    assert text.decode(ids, with_specials=True) == "<bos>user:hi<end>model:"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% if %}",
        "{% break %}",
    ],
)
def test_a_template_that_refuses_or_attacks_is_one_sentence(
    template: str, folder: Path, tmp_path: Path
) -> None:
    text = with_config(folder, tmp_path, chat_template=template)
    with pytest.raises(InputError, match="the chat template cannot render"):
        text.encode_chat([{"role": "user", "content": "hi"}])


def test_a_template_that_makes_much_of_little_is_refused(folder: Path, tmp_path: Path) -> None:
    """Tokenizing it could take longer than rendering it may."""
    template = "{% for i in range(9999) %}{{ messages[0].content * 20 }}{% endfor %}"
    text = with_config(folder, tmp_path, chat_template=template)
    message = {"role": "user", "content": "hello "}
    with pytest.raises(
        InputError, match=r"makes 1,199,880 characters of a conversation of \d{2,3},"
    ):
        text.render_chat([message], {})
    # The control: as much, of more.
    text = with_config(folder, tmp_path, chat_template=template.replace("* 20", "[:120]"))
    message = {"role": "user", "content": "hello " * 2000}
    assert len(text.render_chat([message], {})) == 1_199_880


def test_without_a_template_a_chat_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        Text(tokenizer_files(folder)).encode_chat([{"role": "user", "content": "hi"}])


def test_a_malformed_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Text(tokenizer_files(tmp_path))


@pytest.mark.parametrize("prefix", ["", "ab"])
def test_merges_without_their_prefix_are_refused(prefix: str, tmp_path: Path) -> None:
    """The library would cut where no character ends, and end this process."""
    save(byte_fallback(), tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["model"]["continuing_subword_prefix"] = prefix or None
    path.write_text(json.dumps(value), encoding="utf-8")
    if prefix:
        with pytest.raises(TokenizerError, match=r"merges `a`, which does not begin with .* `ab`"):
            open_tokenizer(tokenizer_files(tmp_path))
    else:
        assert open_tokenizer(tokenizer_files(tmp_path))


def test_a_template_whose_tokens_have_no_ids_is_refused(tmp_path: Path) -> None:
    save(byte_fallback(), tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(TokenizerError, match="puts `<bos>` around a text, and does not say its id"):
        open_tokenizer(tokenizer_files(tmp_path))


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_template_with_a_second_text_is_refused(name: str, tmp_path: Path) -> None:
    """The library would print where its code ended."""
    save(byte_fallback(), tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    single = value["post_processor"]["single"]
    next(piece for piece in single if "Sequence" in piece)["Sequence"]["id"] = name
    path.write_text(json.dumps(value), encoding="utf-8")
    if name == "B":
        with pytest.raises(TokenizerError, match="puts a text `B` where there is only one, `A`"):
            open_tokenizer(tokenizer_files(tmp_path))
    else:
        assert open_tokenizer(tokenizer_files(tmp_path))


def test_what_the_library_raises_of_its_own_is_one_sentence(tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As Rust's panics come to Python."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    save(byte_fallback(), tmp_path)
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", {})
    tokenizer._tokenizer = type("Broken", (), {"encode": panic, "decode": panic})()
    with pytest.raises(TokenizerError, match=r"cannot be read: index out of bounds"):
        tokenizer.encode("a")
    with pytest.raises(TokenizerError, match=r"cannot be read: index out of bounds"):
        tokenizer.decode([1])
