"""Does a chat format render what the template renders?

The conversations are made from the format, so that all its joints are met, and from the template,
so that texts hold what the template might look for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Environment, TemplateError

from pleexport.errors import InputError
from pleexport.parity.text_cases import TEXTS
from pleexport.runtime.chat_format import ROLES, ChatFormat
from pleexport.runtime.tokenizer import Tokenizer

SECONDS = 8.0  # of the processor
# Long after any template was written, and not the present.
THEN = datetime(2031, 11, 24, 21, 43, 55)
_LITERALS = 60  # of a template
_WALKS = 60
_TURNS = 7
_SHOWN = 60  # characters of a text in a sentence

Messages = list[dict[str, str]]
# A conversation, what a template may ask for, and the present, as a text.
Render = Callable[[Messages, dict[str, Any], datetime | None], str]


def template_of(tokenizer: Tokenizer) -> Render:
    """What a tokenizer's chat template makes of conversations."""
    return lambda messages, asked, now: tokenizer.render_chat(messages, asked, now=now)


def first_difference(
    form: ChatFormat, render: Render, template: str, *, seconds: float = SECONDS
) -> tuple[int, str | None]:
    """How many conversations are alike, and how the first other one differs, as a clause.

    Args:
        render: what the template makes of a conversation.
        template: its source.
        seconds: after which no conversation is begun, and this is the difference.
    """
    end, count = time.thread_time() + seconds, 0
    switches = [True, False] if "enable_thinking" in template else []
    said = list(conversations(form, template))
    for nth, messages in enumerate(said):
        if time.thread_time() > end:
            return count, f"the template takes longer than {seconds:g} s for {nth} conversations"
        for switch in (None, *switches):
            asked = {"add_generation_prompt": True}
            asked |= {} if switch is None else {"enable_thinking": switch}
            # Once in a while, at another date.
            now = THEN if nth % 8 == 0 else None
            try:
                ours = form.render(messages, thinking=switch)
            except InputError:
                continue  # it has no place for these, which programs are told
            if problem := _difference(ours, partial(render, messages, asked, now)):
                roles = ", ".join(message["role"] for message in messages)
                return count, f"of the messages {roles} {problem}"
            count += 1
    return count, None if count else "it has a place for no conversation"


def _difference(ours: str, render: Callable[[], str]) -> str | None:
    try:
        theirs = render()
    except InputError as err:
        return f"it makes nothing, and its parts make {_quoted(ours)} ({err.message})"
    if ours == theirs:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if at is None else at
    return (
        f"it makes {_quoted(theirs[at:])} from character {at} on, and its parts make "
        f"{_quoted(ours[at:])}"
    )


def conversations(form: ChatFormat, template: str) -> Iterator[Messages]:
    """Conversations that the format has a place for; always the same."""
    generator = random.Random(0)
    texts = [*_contents(form, template)]
    generator.shuffle(texts)
    paths = [_as_said(form, path) for path in _paths(form) if path]
    # Every text in every role, packed into as few conversations as that takes.
    waiting = {role: list(texts) for role in ROLES}
    while any(waiting[role] for path in paths for role in path):
        path = max(paths, key=lambda p: sum(bool(waiting[role]) for role in set(p)))
        yield [
            {"role": role, "content": waiting[role].pop() if waiting[role] else "Fine."}
            for role in path
        ]
    for path in paths:
        yield [{"role": role, "content": f"Text {i}."} for i, role in enumerate(path)]
        for empty in range(len(path)):
            for blank in ("", " \n"):
                yield [
                    {"role": role, "content": blank if i == empty else "Text."}
                    for i, role in enumerate(path)
                ]
    for _ in range(_WALKS):
        if path := _as_said(form, _walk(form, generator)):
            yield [{"role": role, "content": generator.choice(texts)} for role in path]


def _as_said(form: ChatFormat, path: list[str]) -> list[str]:
    """The order in which messages are said that stand in another order in the text."""
    if form.system_moves and "system" in path:
        return ["system", *(role for role in path if role != "system")]
    return path


def _paths(form: ChatFormat) -> Iterator[list[str]]:
    """Short ways through the joints: each joint is on one of them."""
    pairs = [(joint.previous, joint.next) for joint in form.joints]
    reached: dict[str, list[str]] = {"start": []}
    for _ in ROLES:
        for previous, following in pairs:
            if previous in reached and following != "answer":
                reached.setdefault(following, [*reached[previous], following])
    leaves: dict[str, list[str]] = {}
    for _ in ROLES:
        for previous, following in reversed(pairs):
            if following == "answer":
                leaves[previous] = []
            elif following in leaves:
                leaves.setdefault(previous, [following, *leaves[following]])
    for previous, following in pairs:
        if previous in reached and (following == "answer" or following in leaves):
            step = [] if following == "answer" else [following, *leaves[following]]
            yield [*reached[previous], *step]


def _walk(form: ChatFormat, generator: random.Random) -> list[str]:
    """Roles of a conversation, as joints go on from each other; perhaps it ends nowhere."""
    following: dict[str, list[str]] = {}
    for joint in form.joints:
        following.setdefault(joint.previous, []).append(joint.next)
    path: list[str] = []
    role = "start"
    for _ in range(_TURNS):
        ends = ["answer"] if "answer" in following.get(role, []) and len(path) > 1 else []
        role = generator.choice([*following.get(role, ["answer"]), *ends])
        if role == "answer":
            break
        path.append(role)
    return path if role in ("answer", "user") or not path else path[:-1]


def _contents(form: ChatFormat, template: str) -> Iterator[str]:
    """Texts of messages: of many kinds, and with what the template and the format are made of."""
    yield from (text for text in TEXTS if text.strip() and len(text) < 300)
    for space in (" ", "\n", "\n\n", "\t ", "\r\n", "\u00a0", "\u2028", "\x85", "\x1f", "\u3000"):
        yield f"{space}Spaced.{space}"
    yield from ("0", "None", "false", "{{ messages }}", "{% if %}", "\\n", "'\"", "<", ">")
    own = [joint.text for joint in form.joints] + [*_markers(form)]
    pieces = [p for text in (*own, *_literals(template)) for p in (text.strip(), *text.split("\n"))]
    # Those that look like markers first: what a template looks for in texts is seldom a word.
    found = sorted({p for p in pieces if p.strip()}, key=lambda p: (p.isidentifier(), p))
    for part in found[:_LITERALS]:
        yield from (part, f"{part}Then.", f"Before.{part}\n\nThen.{part}")
    for begin, end in (("<think>", "</think>"), *_pairs(form)):
        yield f"{begin}\nA thought.\n{end}\n\nAn answer."
        yield f"{begin}One.{end}First.{begin}Two.{end}\n Second.\n"
        yield f"A thought.{end}An answer. {begin}"
        yield f"{end}{begin}"
        yield f"{begin}{end}"


def _pairs(form: ChatFormat) -> list[tuple[str, str]]:
    return [(form.thoughts.open or "", form.thoughts.close)] if form.thoughts else []


def _markers(form: ChatFormat) -> set[str]:
    return {marker for pair in _pairs(form) for marker in pair if marker}


def _literals(template: str) -> Iterator[str]:
    """The strings of a template's source, and the texts between its tags."""
    try:
        for _, kind, value in Environment().lex(template):
            if kind == "data":
                yield value
            elif kind == "string":
                yield value[1:-1].replace("\\n", "\n").replace("\\t", "\t").replace("\\'", "'")
    except TemplateError:
        return  # it renders nothing either


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
