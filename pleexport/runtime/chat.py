"""Render a conversation with a checkpoint's chat template, which is not trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pleexport.errors import InputError


def render_chat(
    template: str, messages: Iterable[dict[str, str]], specials: Mapping[str, str]
) -> str:
    """The text of a conversation, ready for the model's answer.

    Args:
        messages: objects with `role` and `content`.
        specials: texts of special tokens, by the names that templates have for them.
    Raises:
        InputError: the template refuses, or is malformed.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **specials
        )
    except (TemplateError, ArithmeticError, RecursionError, TypeError, ValueError) as err:
        raise InputError(
            f"the chat template cannot render this conversation: {err}",
            hint="add `--no-chat` to continue plain text",
        ) from err


def _refuse(message: str) -> None:
    raise TemplateError(message)
