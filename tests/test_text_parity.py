"""Level 0: text and ids of a bundle against `AutoTokenizer` of the checkpoint's folder."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from jinja2 import TemplateError
from odd_tokenizers import FOLDERS, write
from test_world_tokenizer import published_vocabulary
from tokenizers_in_code import byte_fallback, save
from transformers import AutoTokenizer

from pleexport.errors import InputError, PleexportError
from pleexport.export.text_files import text_files
from pleexport.parity import original_text
from pleexport.parity import text as text_parity
from pleexport.parity.report import TextCheck
from pleexport.parity.text_cases import CONVERSATIONS, TEXTS
from pleexport.runtime import chat, template_limit
from pleexport.runtime.template_limit import SECONDS, within_limits
from pleexport.runtime.tokenizer import Tokenizer, tokenizer_files
from pleexport.runtime.world_tokenizer import VOCABULARY

CONFIG = '{"model_type": "gemma4_text"}'
MARKED = "<a1> <a2>x<x1> <x2><end2> <d1> <d2> <s1><s2><stop> <call><img> <sound> <bos>a<eos>"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the original here: a process of its own takes seconds to start."""
    from transformers.utils import chat_template_utils

    def read(source: Path, folder: Path) -> original_text.OriginalText:
        monkeypatch.setattr(chat_template_utils, "datetime", original_text._Clock)
        original_text._write(source, folder)
        return original_text._collect(folder, "nothing")

    monkeypatch.setattr("pleexport.parity.text.read_original_text", read)


def check_text(ours: Tokenizer, original: original_text.OriginalText | None) -> TextCheck:
    found = text_parity.check_text(ours, original)
    assert found is not None
    return found


def original_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_text_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    scratch.mkdir()
    FOLDERS[name](folder)
    (folder / "config.json").write_text(CONFIG)
    text = text_files(folder, scratch)
    assert not text.notes
    ours, original = Tokenizer(text.files), original_of(folder)
    assert check_text(ours, text.original).differences == ()
    # Once more against the library in this process, with nothing stored in between.
    for string in (*TEXTS, MARKED):
        ids = original(string)["input_ids"]
        assert ours.encode(string) == ids
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, with_specials=True) == original.decode(ids)
    generator = random.Random(name)
    for _ in range(300):
        ids = [generator.randrange(len(original) + 3) for _ in range(9)]
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == original.special_tokens_map


def with_template(folder: Path, **config: Any) -> Path:
    save(byte_fallback(), folder, bos_token="<bos>", eos_token="<eos>", **config)
    write(folder, "config.json", CONFIG)
    return folder


def prepared(folder: Path, tmp_path: Path) -> tuple[Tokenizer, Any]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text = text_files(folder, scratch)
    assert text.original
    return Tokenizer(text.files), text.original


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_become_the_prompts_of_the_original(name: str, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "folder", chat_template=TEMPLATES[name])
    ours, original = prepared(folder, tmp_path)
    found = check_text(ours, original)
    assert found.differences == ()
    assert found.conversations == len(CONVERSATIONS)
    assert found.template == "tokenizer_config.json"
    refuses_all = name in ("broken", "hostile", "underscores")
    assert (found.refused == found.conversations) == refuses_all
    library = original_of(folder)
    for _, messages, arguments in CONVERSATIONS:
        try:
            text = library.apply_chat_template(messages, tokenize=False, **arguments)
        except Exception:
            with pytest.raises(InputError, match="the chat template cannot render"):
                ours.render_chat(messages, arguments)
        else:
            assert ours.render_chat(messages, arguments, now=original_text.NOW) == text


@pytest.mark.usefixtures("in_this_process")
def test_a_file_alone_is_a_tokenizer(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "folder", chat_template="not of the file")
    file = folder / "mine.json"
    (folder / "tokenizer.json").rename(file)
    ours, original = prepared(file, tmp_path)
    assert check_text(ours, original).differences == ()
    assert ours.encode("ab") == [2, *ours.encode_prompt("ab")]
    assert not ours.has_chat_template


PLACES = {
    "tokenizer_config.json": {"chat_template": "{% if tools %}{% endif %}config"},
    "chat_template.jinja": "file",
    "additional_chat_templates/tool_use.jinja": "with tools",
    "processor_config.json": {"chat_template": "processor"},
    "chat_template.json": {"chat_template": "legacy"},
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("names", "place", "rendered", "with_tools"),
    [
        (["tokenizer_config.json"], "tokenizer_config.json", "config", "config"),
        (["chat_template.jinja"], "chat_template.jinja", "file", "file"),
        (["tokenizer_config.json", "chat_template.jinja"], "chat_template.jinja", "file", "file"),
        (
            ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"],
            "chat_template.jinja",
            "file",
            "with tools",
        ),
        (["chat_template.json"], "chat_template.json", "legacy", "legacy"),
        (["processor_config.json"], "processor_config.json", "processor", "processor"),
        (["chat_template.json", "processor_config.json"], "processor_config.json", "processor", ""),
        (["chat_template.json", "chat_template.jinja"], "chat_template.jinja", "file", "file"),
    ],
)
def test_templates_are_found_where_the_original_finds_them(
    names: list[str], place: str, rendered: str, with_tools: str, tmp_path: Path
) -> None:
    folder = with_template(tmp_path / "folder")
    for name in names:
        value = PLACES[name]
        if name == "tokenizer_config.json":
            config = json.loads((folder / name).read_text())
            write(folder, name, config | value)  # type: ignore[operator]
        else:
            write(folder, name, value)
    ours, original = prepared(folder, tmp_path)
    found = check_text(ours, original)
    assert found.differences == ()
    assert found.template == place
    assert ours.render_chat([{"role": "user", "content": ""}], {}) == rendered
    if with_tools:
        assert ours.render_chat([{"role": "user", "content": ""}], {"tools": [{}]}) == with_tools
    contradicted = {"chat_template.json"} & {*names} - {place}
    assert original.witness.notes == [
        f"`{name}` has another chat template than `{place}`, which is used" for name in contradicted
    ]


@pytest.mark.usefixtures("in_this_process")
def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]
    ours, original = prepared(with_template(tmp_path / "f", chat_template=named), tmp_path)
    assert check_text(ours, original).differences == ()
    with pytest.raises(InputError, match="has the chat templates rag, tool_use, and none is the"):
        ours.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("broken", "difference"),
    [
        ("tokenizer.json", "the text"),
        ("pleexport.runtime.chat._to_json", "the conversation `tools`"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("pleexport.runtime.json_tokenizer.clean", "the ids"),
                ("pleexport.runtime.json_tokenizer.JsonTokenizer._is_byte", "stream as"),
            )
        ),
    ],
)
def test_what_is_broken_is_found(
    broken: str, difference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls: each comparison fails where what it compares is wrong."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    options = {"clean_up_tokenization_spaces": True, forced: True}
    folder = with_template(tmp_path / "folder", chat_template=TEMPLATES["thinking"], **options)
    ours, original = prepared(folder, tmp_path)
    assert check_text(ours, original).differences == ()
    if broken in original.files:
        stored = json.loads(original.files[broken].read_text())
        original.files[broken].write_text(json.dumps(stored | {"normalizer": None}))
    else:
        monkeypatch.setattr(broken, lambda *_, **__: "")
    chat._compile.cache_clear()
    found = check_text(Tokenizer(original.files), original).differences
    chat._compile.cache_clear()
    assert any(difference in sentence for sentence in found), found


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ messages | tojson(indent=10 ** 10) }}",
        "{{ 2 ** (10 ** 10) }}",
        "{{ 9 | round(-99999999) }}",
        "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
        "{{ ['a' * 10 ** 6] * 10 ** 6 | join }}",
        "{{ 'a'.join(['b' * 10 ** 6] * 10 ** 6) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_never_ends_is_stopped(template: str) -> None:
    started = time.thread_time()
    with pytest.raises(InputError, match="the chat template cannot render"):
        chat.render_chat(template, [{"role": "user", "content": ""}], {})
    assert time.thread_time() - started < SECONDS + 2


def test_what_ends_a_template_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    def closed_late() -> Iterator[int]:
        try:
            yield 1
        finally:
            sum(range(2000))

    def go_on() -> None:  # and on, had the first one switched the limit off
        while True:
            next(closed_late())  # closed at once: what is raised in that would be told
            sum(range(100))

    with pytest.raises(TemplateError, match="it takes longer"):
        within_limits(go_on, seconds=0.05)
    assert capfd.readouterr().err == ""


def test_a_stop_that_comes_too_late_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException] | None] = []  # to this thread, which does not see it yet
    monkeypatch.setattr(template_limit, "_raise_in", lambda _, kind: told.append(kind))

    def work() -> str:
        while not told:
            time.sleep(0.001)
        return "done"

    assert within_limits(work, seconds=-1.0) == "done"
    count = len(told)
    time.sleep(0.05)
    assert count == len(told), "the watch went on"
    assert told[0] is not None
    assert told[-1] is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere time is that of the clock")
def test_a_template_that_waits_for_the_processor_is_not_stopped() -> None:
    assert within_limits(lambda: time.sleep(0.3), seconds=0.2) is None


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"extra_special_tokens": 3}, "TypeError: "),
        ({"auto_map": {"AutoTokenizer": ["a.B", "a.B"]}}, "ValueError: "),
        ([], "AttributeError: "),
    ],
)
def test_a_tokenizer_that_transformers_cannot_open_is_noted(
    config: Any, problem: str, tmp_path: Path
) -> None:
    """In a process of its own, as in a build."""
    folder, scratch = with_template(tmp_path / "folder"), tmp_path / "scratch"
    scratch.mkdir()
    write(folder, "tokenizer_config.json", config)
    text = text_files(folder, scratch)
    assert len(text.notes) == 1
    start = f"the tokenizer at `{folder}` is copied as it is and compared with nothing, as"
    assert text.notes[0].startswith(f"{start} transformers cannot open it ({problem}")
    assert "\n" not in text.notes[0]
    found = check_text(Tokenizer(text.files), text.original)
    assert found.original is None
    assert found.not_compared
    assert found.differences == ()
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert "is left out, as transformers cannot open it" in text_files(folder, scratch).notes[0]


def test_the_original_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    with_template(folder, chat_template=TEMPLATES["thinking"])
    scratch.mkdir()
    found = original_text.read_original_text(folder, scratch)
    assert found.problem is None
    assert found.witness
    assert check_text(Tokenizer(found.files), found).differences == ()


def test_without_an_original_streams_are_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Tokenizer(tokenizer_files(save(byte_fallback(), tmp_path)))
    found = check_text(ours, None)
    assert (found.not_compared, found.differences) == ("the checkpoint has no tokenizer", ())
    monkeypatch.setattr("pleexport.runtime.json_tokenizer.JsonTokenizer._is_byte", lambda *_: False)
    assert "stream as" in check_text(ours, None).differences[0]


def test_the_vocabulary_of_rwkv_gives_every_text_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Tokenizer({VOCABULARY: published_vocabulary()})
    found = check_text(ours, None)
    assert found.not_compared == "transformers has no tokenizer of this kind"
    assert found.differences == ()
    monkeypatch.setattr(Tokenizer, "decode", lambda *_, **__: "")
    assert "comes back as ''" in check_text(ours, None).differences[0]


def test_a_disk_that_takes_no_tokenizer_is_no_tokenizer_that_cannot_be_opened(
    tmp_path: Path,
) -> None:
    with pytest.raises(PleexportError) as caught:
        original_text.read_original_text(save(byte_fallback(), tmp_path), tmp_path / "gone")
    gone = tmp_path / "gone"
    assert caught.value.message == f"`{gone}` cannot be written: no such file or directory"
    assert caught.value.hint
