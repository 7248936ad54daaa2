"""The text of a conversation from data alone, for programs that have no template engine.

A build derives the data from a checkpoint's chat template, and proves that they render what the
template renders. `ChatFormat.render` is all that another language has to repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec

from pleexport.errors import InputError

Role = Literal["system", "user", "assistant"]
# A conversation begins with "start"; "answer" is what the model writes next.
Before = Literal["start", "system", "user", "assistant"]
After = Literal["system", "user", "assistant", "answer"]
# A manifest is not trusted: what is longer than any template in use is refused.
Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]
Characters = Annotated[str, msgspec.Meta(max_length=64)]
Marker = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
ROLES: tuple[str, ...] = get_args(Role)


class Joint(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What stands between two messages, before the first, or before the answer.

    Attributes:
        previous, next: roles of the messages around it.
        trim_previous: characters that are taken off the end of the message before it.
        trim_next: characters that are taken off the beginning of the message behind it.
    """

    previous: Before
    next: After
    text: Text
    trim_previous: Characters = ""
    trim_next: Characters = ""


Joints = Annotated[list[Joint], msgspec.Meta(max_length=16)]


class Thoughts(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """How thoughts are taken out of what the assistant said before.

    Attributes:
        open: what a thought begins with. None where all up to the last `close` is one.
        close: what a thought ends with.
        trim_start, trim_end: characters that are taken off what is left, where a thought was found.
    """

    open: Marker | None = None
    close: Marker
    trim_start: Characters = ""
    trim_end: Characters = ""

    def cut(self, content: str) -> str:
        """An answer without its thoughts."""
        if self.open is None:
            left = content.rpartition(self.close)[2]
        else:
            left = "".join(part.partition(self.open)[0] for part in content.split(self.close))
        if left == content:
            return content
        return strip(left, start=self.trim_start, end=self.trim_end)


class ChatFormat(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """A chat template as data: for conversations of plain texts, without tools.

    Attributes:
        joints: of the messages that may follow each other; others are refused.
        thinking_on, thinking_off: joints that take the place of those with the same `previous` and
            `next` where thinking is asked for, or asked not to be done.
        thoughts: None where answers stay as they are.
        need_text: roles whose messages must not be empty.
        system_moves: the system's message goes to the place before the user's last message.
        end_ids: the special token that stands behind an answer; none where there is no such token.
            Where texts end, `eos_token_ids` of the manifest says.
    """

    joints: Joints
    thinking_on: Joints = []
    thinking_off: Joints = []
    thoughts: Thoughts | None = None
    need_text: Annotated[list[Role], msgspec.Meta(max_length=3)] = []
    system_moves: bool = False
    end_ids: Annotated[list[int], msgspec.Meta(max_length=16)] = []

    def contradiction(self) -> str | None:
        """What contradicts itself, as a clause; None where nothing does."""
        for name in ("joints", "thinking_on", "thinking_off"):
            pairs = [(joint.previous, joint.next) for joint in getattr(self, name)]
            for pair in pairs:
                if pairs.count(pair) > 1:
                    return f"`{name}` has two joints from `{pair[0]}` to `{pair[1]}`"
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None) -> str:
        """The text of a conversation, up to where the answer begins.

        Args:
            messages: objects with `role` and `content`, both strings.
            thinking: whether the model should; None leaves it to the format.
        Raises:
            InputError: the format has no place for a message.
        """
        switched = {None: [], True: self.thinking_on, False: self.thinking_off}[thinking]
        joints: dict[tuple[str, str], Joint] = {}
        joints |= {(joint.previous, joint.next): joint for joint in (*self.joints, *switched)}
        said = [_role_and_content(message) for message in messages]
        said = self._moved(said) if self.system_moves else said
        rendered, previous, content, trim_start = "", "start", "", ""
        for role, following in [*said, ("answer", "")]:
            joint = joints.get((previous, role))
            if joint is None:
                raise InputError(
                    f"the bundle's chat format has no place for {_named(role)} {_behind(previous)}",
                    hint="after the system's message, user and assistant take turns",
                )
            content = strip(content, start=trim_start, end=joint.trim_previous)
            if previous == "assistant" and self.thoughts:
                content = self.thoughts.cut(content)
            if not content and previous in self.need_text:
                raise InputError(
                    f"the bundle's chat format has no place for an empty message of `{previous}`",
                    hint="leave the message out, or write something in it",
                )
            rendered += content + joint.text
            previous, content, trim_start = role, following, joint.trim_next
        return rendered

    @staticmethod
    def _moved(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Messages with the system's before the last of the user's."""
        if any(role == "system" for role, _ in said[1:]):
            raise InputError(
                "the bundle's chat format has no place for a message of `system` after another",
                hint="let the system speak first, and once",
            )
        last = max((i for i, (role, _) in enumerate(said) if role == "user"), default=0)
        if last and said[0][0] == "system":
            return [*said[1:last], said[0], *said[last:]]
        return said


def strip(text: str, *, start: str, end: str) -> str:
    """A text without these characters at its start and its end."""
    # An empty string would stand for all spaces.
    text = text.lstrip(start) if start else text
    return text.rstrip(end) if end else text


def _role_and_content(message: Mapping[str, Any]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(
            f"the bundle's chat format knows no role `{role}`",
            hint=f"roles are {', '.join(ROLES)}",
        )
    if not isinstance(content, str):
        raise InputError(
            f"the `content` of a message of `{role}` is no text",
            hint="the bundle's chat format knows no parts; write their text as one string",
        )
    if other := sorted(name for name in message if name not in ("role", "content")):
        raise InputError(
            f"the bundle's chat format knows `role` and `content` of a message, not `{other[0]}`",
            hint="tools and the like need a program with a template engine",
        )
    return str(role), content


def _named(role: str) -> str:
    return "an answer" if role == "answer" else f"a message of `{role}`"


def _behind(previous: str) -> str:
    return "at the beginning" if previous == "start" else f"after one of `{previous}`"
