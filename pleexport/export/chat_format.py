"""Derive a chat format from a checkpoint's chat template, by what it makes of short conversations.

What a template does is read off its output, so that no template's source has to be understood. What
was read off is then held to the template on many other conversations.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import cast

import msgspec

from pleexport.errors import InputError
from pleexport.parity.chat_format import SECONDS, THEN, Render, first_difference, template_of
from pleexport.runtime.chat_format import After, Before, ChatFormat, Joint, Role, Thoughts
from pleexport.runtime.thoughts import MARKERS
from pleexport.runtime.tokenizer import Tokenizer

# What Python's `str.strip` takes off: each of them is tried.
WHITESPACE = "".join(filter(str.isspace, map(chr, range(1 << 16))))
_LONGEST = 500  # characters of a clause
_DAYS = (datetime(2025, 1, 2, 3, 4, 5), THEN)
_FIRST_TRIED, _MORE_TRIED = "\n ", "\t\r\v\f"
_TALK: list[list[str]] = [["user", "assistant", "user"]]
_WITH_SYSTEM: list[list[str]] = [["system", "user"], ["system", "user", "assistant", "user"]]
# Other orders, which a format has where the template does.
_ODD: list[list[str]] = [
    ["user", "user"],
    ["user", "assistant", "assistant", "user"],
    ["assistant", "user"],
    ["system", "assistant", "user"],
    ["user", "system", "user"],
    ["user", "assistant", "system", "user"],
    ["user", "assistant"],
    ["system"],
]
_SPLITS = re.compile(r"""split\(\s*(?:'([^'\\]+)'|"([^"\\]+)")""")
_Joints = dict[tuple[str, str], Joint]


@dataclass(frozen=True)
class FoundFormat:
    """A chat format, or why there is none, as a clause; neither where there is no template."""

    form: ChatFormat | None
    problem: str | None = None

    def notes(self, eos_token_ids: Sequence[int]) -> list[str]:
        """What a user should know, as sentences.

        Args:
            eos_token_ids: ids that end any text.
        """
        if self.problem:
            return [
                "the chat template cannot be told as data, so programs without a template engine "
                f"will refuse to chat: {self.problem}"
            ]
        own = self.form.end_ids if self.form else []
        return [
            f"the chat template ends an answer with the id {i}, and the checkpoint does not say "
            "that a text ends there; if answers do not stop, add it to `eos_token_id` in its "
            "generation_config.json"
            for i in own
            if i not in eos_token_ids
        ]


class _Inexpressible(Exception):
    """Why a template cannot be told as data, as a clause."""


def find_chat_format(tokenizer: Tokenizer | None) -> FoundFormat:
    """The format of a tokenizer's template for conversations without tools."""
    template = tokenizer.chat_template if tokenizer else None
    if tokenizer is None or template is None:
        return FoundFormat(None)
    render, markers = template_of(tokenizer), tokenizer.thought_markers
    try:
        form = derive(render, template, thought_markers=markers)
    except _Inexpressible as err:
        # It may quote the template, which is not trusted.
        return FoundFormat(None, str(err).encode(errors="replace").decode()[:_LONGEST])
    return FoundFormat(msgspec.structs.replace(form, end_ids=_end_ids(form, tokenizer)))


def derive(
    render: Render, template: str, *, thought_markers: Sequence[tuple[str, str]] = ()
) -> ChatFormat:
    """The format that renders what a template does.

    Args:
        render: what the template makes of a conversation.
        template: its source.
        thought_markers: what may stand around thoughts, beside what is known and what it says.
    Raises:
        _Inexpressible: none does.
    """
    end, problem = time.thread_time() + SECONDS, ""
    if len({_Prober(render, end).text(["user"], ["Hello."], None, now=now) for now in _DAYS}) > 1:
        raise _Inexpressible("it says what day it is")
    splits = [a or b for a, b in _SPLITS.findall(template)]
    markers = [
        *MARKERS,
        *thought_markers,
        *((begin, close) for close in splits for begin in ("", *splits)),
    ]
    for odd in (_ODD, []):
        prober = _Prober(render, end)
        try:
            form = _checked(_read_off(prober, odd, markers, switches="enable_thinking" in template))
        except _Inexpressible as err:
            problem = str(err)
            continue
        left = end - time.thread_time()
        _, difference = first_difference(form, render, template, seconds=left)
        if difference is None:
            return form
        problem = difference
    raise _Inexpressible(problem)


def _checked(form: ChatFormat) -> ChatFormat:
    """The format as a manifest gives it back."""
    try:
        return msgspec.json.decode(msgspec.json.encode(form), type=ChatFormat)
    except (msgspec.MsgspecError, ValueError) as err:  # the latter for half surrogate pairs
        raise _Inexpressible(f"its parts have no place in a manifest ({err})") from err


class _Prober:
    """Reads joints off what a template makes of conversations.

    Args:
        end: when no more conversations are tried, by this thread's processor time.
    """

    def __init__(self, render: Render, end: float) -> None:
        self._render, self._end = render, end
        self.refusal = ""

    def text(
        self,
        roles: list[str],
        contents: list[str],
        thinking: bool | None,
        now: datetime | None = None,
    ) -> str | None:
        """The text of a conversation; None where the template refuses it."""
        if time.thread_time() > self._end:
            raise _Inexpressible(f"it takes longer than {SECONDS:g} s to find out what it does")
        asked = {"add_generation_prompt": True}
        asked |= {} if thinking is None else {"enable_thinking": thinking}
        pairs = zip(roles, contents, strict=True)
        try:
            return self._render([{"role": r, "content": c} for r, c in pairs], asked, now)
        except InputError as err:
            self.refusal = err.message
            return None

    def joints(self, roles: list[str], order: list[int], thinking: bool | None) -> _Joints | None:
        """The joints of a conversation; None where its messages do not come in this order."""
        texts = self._between(roles, order, thinking, "{}")
        if texts is None:
            return None
        trims_next = self._trimmed(roles, order, thinking, texts, "{space}{}")
        trims_previous = self._trimmed(roles, order, thinking, texts, "{}{space}")
        names = ["start", *(roles[i] for i in order), "answer"]
        return {
            (previous, following): Joint(
                previous=cast(Before, previous),
                next=cast(After, following),
                text=text,
                trim_previous=trim_previous if previous != "start" else "",
                trim_next=trim_next if following != "answer" else "",
            )
            for (previous, following), text, trim_previous, trim_next in zip(
                pairwise(names), texts, trims_previous, trims_next, strict=True
            )
        }

    def _between(
        self, roles: list[str], order: list[int], thinking: bool | None, form: str, space: str = ""
    ) -> list[str] | None:
        """What stands between the contents of messages, spaces around these included."""
        contents = [f"Qx{i}{role}xQ" for i, role in enumerate(roles)]
        rest = self.text(roles, [form.format(c, space=space) for c in contents], thinking)
        texts = []
        for i in order:
            if rest is None or rest.count(contents[i]) != 1:
                return None
            text, _, rest = rest.partition(contents[i])
            texts.append(text)
        return None if rest is None else [*texts, rest]

    def _trimmed(
        self, roles: list[str], order: list[int], thinking: bool | None, texts: list[str], form: str
    ) -> list[str]:
        """For each joint, the characters that are taken off on its side of a message."""

        def gone(space: str) -> list[bool]:
            found = self._between(roles, order, thinking, form, space)
            return [a == b for a, b in zip(found or "", texts, strict=bool(found))]

        return _taken_off(gone, len(texts))


def _taken_off(gone: Callable[[str], list[bool]], count: int) -> list[str]:
    """For each of several places, the characters that are taken off there.

    Args:
        gone: whether a text of spaces is taken off whole, by place; empty where none is.
    """
    tried = {space: gone(space) for space in _FIRST_TRIED}
    if not any(map(any, tried.values())):
        return [""] * count
    whole = gone(WHITESPACE)
    if not all(whole) or not whole:
        tried |= {space: gone(space) for space in _MORE_TRIED}
    return [
        WHITESPACE
        if whole and whole[i]
        else "".join(space for space in tried if tried[space] and tried[space][i])
        for i in range(count)
    ]


def _read_off(
    prober: _Prober, odd: list[list[str]], markers: Sequence[tuple[str, str]], *, switches: bool
) -> ChatFormat:
    """What a template seems to do."""
    joints, moves = _joints(prober, odd, None)
    changed: dict[bool, list[Joint]] = {True: [], False: []}
    for thinking in changed if switches else ():
        switched, _ = _joints(prober, odd, thinking)
        if joints.keys() - switched.keys():
            raise _Inexpressible("thinking changes which roles may follow each other")
        changed[thinking] = [switched[pair] for pair in joints if switched[pair] != joints[pair]]
    form = ChatFormat(
        joints=list(joints.values()),
        thinking_on=changed[True],
        thinking_off=changed[False],
        thoughts=_thoughts(prober, markers),
        system_moves=moves,
    )
    return msgspec.structs.replace(form, need_text=_need_text(prober, form))


def _joints(prober: _Prober, odd: list[list[str]], thinking: bool | None) -> tuple[_Joints, bool]:
    """The joints by roles, and whether the system's message moves to the last of the user's."""
    joints: _Joints = {}
    for roles in _TALK:
        found = prober.joints(roles, [*range(len(roles))], thinking)
        if found is None:
            reason = prober.refusal or "it changes the texts of messages, or their order"
            raise _Inexpressible(f"it has no plain form for user and assistant in turn ({reason})")
        joints |= found
    moves = False
    for roles in _WITH_SYSTEM:
        order = [*range(len(roles))]
        found = prober.joints(roles, order, thinking)
        if found is None and len(roles) > 2:
            found = prober.joints(roles, [*order[1:-1], 0, order[-1]], thinking)
            moves = found is not None
        joints |= {} if found is None else {k: v for k, v in found.items() if k not in joints}
    for roles in odd:
        found = prober.joints(roles, [*range(len(roles))], thinking)
        if found and all(joints.get(pair, joint) == joint for pair, joint in found.items()):
            joints |= found
    return joints, moves


def _thoughts(prober: _Prober, markers: Sequence[tuple[str, str]]) -> Thoughts | None:
    """What is taken out of answers that are followed by more."""
    roles = ["user", "assistant", "user"]

    def answered(answer: str) -> str:
        return prober.text(roles, ["Hello.", answer, "Go on."], None) or ""

    def left(answer: str) -> tuple[bool, ...]:
        text = answered(answer)
        return tuple(f"Qx{i}xQ" in text for i in range(3))

    def trims(form: str) -> str:
        plain = answered(form.format(space=""))
        return _taken_off(lambda space: [answered(form.format(space=space)) == plain], 1)[0]

    for _, close in markers:
        if left(f"Qx0xQ{close}Qx1xQ") == (False, True, False):
            return Thoughts(
                close=close,
                trim_start=trims(f"Qx0xQ{_escaped(close)}{{space}}Qx1xQ"),
                trim_end=trims(f"Qx0xQ{_escaped(close)}Qx1xQ{{space}}"),
            )
    shortest_first = sorted((pair for pair in markers if pair[0]), key=lambda pair: len(pair[0]))
    for begin, close in shortest_first:
        if left(f"Qx0xQ{begin}Qx1xQ{close}Qx2xQ") == (True, False, True):
            thought = _escaped(f"{begin}Qx1xQ{close}")
            return Thoughts(
                open=begin,
                close=close,
                trim_start=trims(f"{thought}{{space}}Qx2xQ"),
                trim_end=trims(f"Qx0xQ{{space}}{thought}"),
            )
    return None


def _escaped(text: str) -> str:
    """A text as `str.format` gives it back."""
    return text.replace("{", "{{").replace("}", "}}")


def _need_text(prober: _Prober, form: ChatFormat) -> list[Role]:
    """Roles whose empty messages are not rendered like others."""
    found: list[Role] = []
    for roles in (*_TALK, *_WITH_SYSTEM):
        for i, role in enumerate(roles):
            for blank in ("", " \n"):
                contents = [blank if i == j else "Text." for j in range(len(roles))]
                pairs = zip(roles, contents, strict=True)
                try:
                    ours = form.render([{"role": r, "content": c} for r, c in pairs])
                except InputError:
                    continue  # there is no place for it anyway
                if ours != prober.text(roles, contents, None) and role not in found:
                    found.append(cast(Role, role))
    return found


def _end_ids(form: ChatFormat, tokenizer: Tokenizer) -> list[int]:
    """The special token behind an answer that is followed by more."""
    for joint in form.joints:
        if (joint.previous, joint.next) == ("assistant", "user"):
            ids = tokenizer.encode_prompt(joint.text)
            special = tokenizer.special_text(ids[0]) if ids else ""
            return ids[:1] if special and joint.text.startswith(special) else []
    return []
