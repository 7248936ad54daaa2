"""Render a conversation with a checkpoint's chat template, which is not trusted.

The surroundings of a template are those that transformers builds: the same environment, the same
arguments, the same names for what a message holds. The template itself runs in jinja's sandbox, and
within limits of time and memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, filters, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pleexport.errors import InputError
from pleexport.runtime.template_limit import within_limits

# How long a text a template may make at once.
_MOST_CHARACTERS = 16 << 20
_MOST_BITS = 1 << 16  # of a number
# Characters that a template may make, and that for each of a conversation: what it makes is
# tokenized, which takes a second for a million.
_MORE_CHARACTERS, _TIMES = 1 << 20, 16
_MOST_DIGITS = 400  # that a number is rounded to; the largest has 309
# Of `%5.2f` and `{:>5}`; at most six digits, written out.
_LARGE_WIDTH = re.compile(r"%[-#0 +]*(\*|\d{7}|\d*\.(\*|\d{7}))|\{[^{}]*:[^{}]*(\{|\d{7})")

Message = Mapping[str, Any]
# Of a message's thoughts; the first is the standard one, and templates know one or the other.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "


def render_chat(
    template: str,
    messages: Sequence[Message],
    arguments: Mapping[str, Any],
    *,
    now: datetime | None = None,
) -> str:
    """The text of a conversation.

    Args:
        messages: objects with `role` and `content`, and whatever else the template knows.
        arguments: what the template may ask for by name. `tools` and `documents` are None and
            `add_generation_prompt` is false where they are missing. With `continue_final_message`
            the last message stays open.
        now: what the template takes for the present.
    Raises:
        InputError: the template refuses, is malformed, or takes too much time or memory.
    """
    try:
        continued = arguments.get("continue_final_message", False)
        if continued and arguments.get("add_generation_prompt"):
            raise ValueError("a last message that goes on leaves no place for another")
        if not all(isinstance(tool, Mapping) for tool in arguments.get("tools") or ()):
            raise TypeError("a tool is an object: its JSON schema")
        chat = [_with_thoughts(_plain(message)) for message in messages]
        last = _open_last(chat) if continued else ""
        names = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": False,
            **{k: _plain(v) for k, v in arguments.items() if k != "continue_final_message"},
        }
        if now:
            names["strftime_now"] = now.strftime
        text = within_limits(lambda: _compile(template).render(messages=chat, **names))
        _check_proportion(len(text), len(str((chat, names))))
        return _cut_open(text, last) if continued else text
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        SyntaxError,  # the Python that jinja makes of it, e.g. of a break outside of a loop
        TypeError,
        ValueError,
    ) as err:
        raise InputError(
            f"the chat template cannot render this conversation: {err or type(err).__name__}",
            hint="add `--no-chat` to continue plain text",
        ) from err


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {name: _guarded(name) for name in filters.FILTERS}
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what would make one step of C code very long."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        bits = _number(left).bit_length() * (_number(right) if operator == "**" else 1)
        if max(bits, _number(right).bit_length()) > _MOST_BITS:
            raise SecurityError(f"numbers are too large for `{operator}`")
        for sequence, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(sequence, str | list | tuple):
                _check_length(len(sequence) * _number(times))
        if operator == "%":
            _check_form(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            _check_length(max(map(_number, (*args, *kwargs.values())), default=0))
            _check_growth(function.__name__, text, *args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_form(value.__self__)
        return wrapped


def _guarded(name: str) -> Callable[..., Any]:
    """A filter of jinja that takes no large number, and makes no large text."""
    original = filters.FILTERS[name]
    most = _MOST_DIGITS if name == "round" else _MOST_CHARACTERS

    @wraps(original)
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_form(value)
        _check_length(max(map(_number, (*args, *kwargs.values())), default=0), most)
        _check_growth(name, value, *args, *kwargs.values())
        return original(value, *args, **kwargs)

    return call


class _Generation(Extension):
    """`{% generation %}` marks what the model has written; here it is only rendered."""

    tags = {"generation"}  # noqa: RUF012  (as in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: names that are set inside stay inside.
        return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` of templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """See `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` of templates, without names that Python keeps to itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in the base class
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no place for `{name}`")


def _plain(value: Any) -> Any:
    """A copy of JSON values; a template sees no other objects, as they may have methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _with_thoughts(message: Any) -> Any:
    """A message without what is None, and with its thoughts under each name for them."""
    if not isinstance(message, dict):
        raise TypeError(f"a message is an object with `role` and `content`, not `{message!r}`")
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = next((message[name] for name in THOUGHTS if name in message), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _open_last(chat: list[Any]) -> str:
    """Mark the end of the last message, and return its text."""
    if not chat:
        raise ValueError("there is no message to go on with")
    content = chat[-1].get("content")
    if isinstance(content, list):
        part = next((p for p in reversed(content) if isinstance(p, dict) and "text" in p), None)
        if part is None:
            raise ValueError("the last message holds no text to go on with")
        text = part["text"]
        part["text"] = text + _CONTINUED
    elif isinstance(content, str):
        text = content
        chat[-1]["content"] = text + _CONTINUED
    else:
        raise ValueError("the last message has no content to go on with")
    return str(text)


def _cut_open(rendered: str, last: str) -> str:
    """The text up to the mark that `_open_last` made."""
    if last.strip() not in rendered or _CONTINUED.strip() not in rendered:
        raise ValueError("the template leaves out a part of the last message, which should go on")
    at = rendered.rindex(_CONTINUED.strip())
    spaced = rendered[at : at + len(_CONTINUED)] == _CONTINUED
    # Where the template trims messages, it has trimmed the mark too.
    return rendered[:at] if spaced else rendered[:at].rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_length(_number(indent))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _check_form(form: Any) -> None:
    if isinstance(form, str) and _LARGE_WIDTH.search(form):
        raise SecurityError("a format asks for a width that is too large, or not written there")


def _check_growth(name: str, *arguments: Any) -> None:
    """Refuse a `replace` or `join` whose text could be far longer than what goes into it."""
    texts = [a for a in arguments if isinstance(a, str)]
    if name == "replace" and len(texts) > 2:
        text, old, new = texts[:3]
        _check_length(text.count(old) * len(new))
    if name == "join":
        lists = [a for a in arguments if isinstance(a, list | tuple)]
        parts = [part for own in lists for part in own]
        longest = sum(map(len, texts)) * len(parts)
        _check_length(longest + sum(len(part) for part in parts if isinstance(part, str)))


def _check_proportion(made: int, given: int) -> None:
    most = _MORE_CHARACTERS + _TIMES * given
    if made > most:
        raise ValueError(
            f"it makes {made:,} characters of a conversation of {given:,}, which may have {most:,}"
        )


def _check_length(length: int, most: int = _MOST_CHARACTERS) -> None:
    if length > most:
        raise SecurityError(f"a text of {length:,} characters is too long")
