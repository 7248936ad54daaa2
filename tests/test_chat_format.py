"""Chat templates as data: derived by a build, proved, and rendered without a template engine."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chat_templates import FORMATS, NO_FORMATS, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_in_code import byte_fallback, save

from pleexport.errors import InputError
from pleexport.export.chat_format import FoundFormat, derive, find_chat_format
from pleexport.parity.chat_format import conversations, first_difference
from pleexport.runtime.bundle import Manifest
from pleexport.runtime.chat import render_chat
from pleexport.runtime.chat_format import ChatFormat, Joint, Thoughts
from pleexport.runtime.tokenizer import Tokenizer, tokenizer_files

SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>"}
ASKED = {"add_generation_prompt": True}
SPACE = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0"
SYSTEM, HELLO, ANSWER, NEXT = (
    {"role": role, "content": content}
    for role, content in (
        ("system", " Be terse. "),
        ("user", " Hello!\n"),
        ("assistant", "<think>hm</think>\n\n Hi. "),
        ("user", "And\nnow?"),
    )
)


class Renderer:
    """What a template makes of a conversation."""

    def __init__(self, template: str) -> None:
        self.template = template

    def __call__(self, messages: Any, asked: dict[str, Any], now: datetime | None = None) -> str:
        return render_chat(self.template, messages, SPECIALS | asked, now=now)


@pytest.fixture(scope="module")
def forms() -> dict[str, ChatFormat]:
    return {name: derive(Renderer(template), template) for name, template in FORMATS.items()}


def joint(form: ChatFormat, previous: str, following: str) -> Joint | None:
    pairs = {(j.previous, j.next): j for j in form.joints}
    return pairs.get((previous, following))  # type: ignore[call-overload,no-any-return]


def test_what_stands_around_messages_is_read_off(forms: dict[str, ChatFormat]) -> None:
    form = forms["own turns"]
    assert joint(form, "start", "user") == Joint(
        previous="start",
        next="user",
        text="<turn>system\nYou are kind.<eos>\n<turn>user\n",
    )
    assert joint(form, "start", "system").text == "<turn>system\n"  # type: ignore[union-attr]
    assert joint(form, "user", "answer").text == "<eos>\n<turn>assistant\n"  # type: ignore[union-attr]
    assert (form.thoughts, form.need_text, form.thinking_on) == (None, [], [])


def test_a_system_message_is_treated_as_the_template_does(forms: dict[str, ChatFormat]) -> None:
    merged = forms["merged"]
    assert merged.render([SYSTEM, HELLO]) == (
        "<bos><start_of_turn>user\n Be terse. \n\nHello!<end_of_turn>\n<start_of_turn>model\n"
    )
    assert joint(forms["refused"], "start", "system") is None
    with pytest.raises(InputError, match="no place for a message of `system` at the beginning"):
        forms["refused"].render([SYSTEM, HELLO])
    moved = forms["moved"]
    assert moved.system_moves
    assert moved.render([SYSTEM, HELLO, ANSWER, NEXT]) == (
        "<bos>[INST] Hello! [/INST] <think>hm</think>\n\n Hi.<eos>[INST]  Be terse. \n\n"
        "And\nnow? [/INST]"
    )
    with pytest.raises(InputError, match="`system` after another"):
        moved.render([HELLO, SYSTEM, HELLO])


def test_thoughts_of_earlier_answers_are_left_out(forms: dict[str, ChatFormat]) -> None:
    assert forms["thoughts"].thoughts == Thoughts(close="</think>", trim_start="\n")
    text = forms["thoughts"].render([HELLO, ANSWER, NEXT])
    assert "<turn>assistant\n Hi. <eos>" in text
    spans = forms["channels"].thoughts
    assert spans is not None
    assert (spans.open, spans.close) == ("<|channel>", "<channel|>")
    assert spans.cut("a<|channel>b<channel|> c <|channel>d<channel|>") == "a c"
    assert spans.cut("a<channel|>b<|channel>c") == "ab"
    assert spans.cut(" plain ") == " plain "


def test_thinking_is_switched(forms: dict[str, ChatFormat]) -> None:
    on, plain, off = (forms["channels"].render([HELLO], thinking=t) for t in (True, None, False))
    assert on == "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\nHello!<turn|>\n<|turn>model\n"
    assert plain == off
    assert plain.endswith("<|turn>model\n<|channel>thought\n<channel|>")


def test_an_empty_message_is_refused_where_it_would_read_otherwise(
    forms: dict[str, ChatFormat],
) -> None:
    form = forms["merged and trimmed"]
    assert form.need_text == ["user"]
    with pytest.raises(InputError, match="no place for an empty message of `user`"):
        form.render([SYSTEM, {"role": "user", "content": " \n"}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HELLO, HELLO], "no place for a message of `user` after one of `user`"),
        ([], "no place for an answer at the beginning"),
        ([{"role": "tool", "content": "x"}], "knows no role `tool`"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "of `user` is no text"),
        ([{**HELLO, "tool_calls": []}], "`role` and `content` of a message, not `tool_calls`"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(
    messages: list[dict[str, Any]], reason: str, forms: dict[str, ChatFormat]
) -> None:
    with pytest.raises(InputError, match=reason):
        forms["merged"].render(messages)


@st.composite
def talks(draw: st.DrawFn) -> list[dict[str, str]]:
    parts = st.sampled_from(["<eos>", "</think>", "<|channel>", "<channel|>", " ", "\n", "[INST]"])
    texts = st.lists(st.text(max_size=6) | parts, max_size=5).map("".join)
    roles = ["user", "assistant"] * draw(st.integers(0, 3)) + ["user"]
    roles = ["system", *roles] if draw(st.booleans()) else roles
    return [{"role": role, "content": draw(texts)} for role in roles]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(messages=talks(), thinking=st.sampled_from([None, True, False]))
@pytest.mark.parametrize("name", FORMATS)
def test_any_conversation_is_rendered_as_the_template_does(
    name: str, forms: dict[str, ChatFormat], messages: Any, thinking: bool | None
) -> None:
    try:
        ours = forms[name].render(messages, thinking=thinking)
    except InputError:
        return
    asked = ASKED if thinking is None else {**ASKED, "enable_thinking": thinking}
    assert ours == Renderer(FORMATS[name])(messages, asked)


@pytest.mark.parametrize("name", NO_FORMATS)
def test_a_template_that_data_cannot_tell_is_refused_with_the_reason(name: str) -> None:
    template, reason = NO_FORMATS[name]
    with pytest.raises(Exception, match=reason):
        derive(Renderer(template), template)


@pytest.mark.parametrize("field", ["text", "trim_next", "thoughts", "thinking_off", "missing"])
def test_a_format_that_is_wrong_is_found(field: str, forms: dict[str, ChatFormat]) -> None:
    """A control for each part: a small change is met by some conversation."""
    name = "thoughts" if field in ("thoughts", "thinking_off") else "merged"
    form, template = forms[name], FORMATS[name]
    assert first_difference(form, Renderer(template), template)[1] is None
    changes: dict[str, Any] = {"thoughts": None, "thinking_off": []}
    if field in changes:
        changed = msgspec.structs.replace(form, **{field: changes[field]})
    else:
        last = form.joints[1]
        worse = {
            "text": {"text": last.text + " "},
            "trim_next": {"trim_next": " "},
            "missing": {"next": "system"},
        }[field]
        joints = [form.joints[0], msgspec.structs.replace(last, **worse), *form.joints[2:]]
        changed = msgspec.structs.replace(form, joints=joints)
    assert first_difference(changed, Renderer(template), template)[1] is not None


def test_conversations_meet_every_joint(forms: dict[str, ChatFormat]) -> None:
    for name, form in forms.items():
        met = set()
        for messages in conversations(form, FORMATS[name]):
            roles = ["start", *(m["role"] for m in messages), "answer"]
            met |= set(pairwise(roles))
        expected = {(j.previous, j.next) for j in form.joints}
        assert form.system_moves or expected <= met


def test_a_slow_template_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pleexport.export.chat_format.SECONDS", 0.0)
    with pytest.raises(Exception, match="it takes longer than 0 s to find out what it does"):
        derive(Renderer(TEMPLATES["plain"]), TEMPLATES["plain"])
    form = ChatFormat(joints=[Joint(previous="start", next="user", text="")])
    found = first_difference(form, Renderer("x"), "x", seconds=-1.0)
    assert found == (0, "the template takes longer than -1 s for 0 conversations")


def test_a_format_without_a_conversation_is_none() -> None:
    found = first_difference(ChatFormat(joints=[]), Renderer("x"), "x")
    assert found == (0, "it has a place for no conversation")


def test_why_there_is_no_format_is_told(tmp_path: Path) -> None:
    template, reason = NO_FORMATS["date"]
    save(byte_fallback(), tmp_path, **SPECIALS, chat_template=template)
    found = find_chat_format(Tokenizer(tokenizer_files(tmp_path)))
    assert (found.form, found.problem) == (None, reason)
    assert found.notes([1]) == [
        "the chat template cannot be told as data, so programs without a template engine will "
        f"refuse to chat: {reason}"
    ]
    assert find_chat_format(None).notes([]) == []
    assert {"chat_format", "no_chat_format"} <= set(Manifest.__struct_fields__)


def test_an_answer_that_ends_with_no_end_of_text_is_noted() -> None:
    found = FoundFormat(ChatFormat(joints=[], end_ids=[5]))
    assert found.notes([5]) == []
    (note,) = found.notes([1])
    assert note.startswith("the chat template ends an answer with the id 5, and the checkpoint")
