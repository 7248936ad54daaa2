"""Every error that a user can meet says what to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pleexport
from pleexport import errors

PACKAGE = Path(pleexport.__path__[0])
USER_ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.PleexportError)
}


def raises_without_hint(source: str) -> list[int]:
    """Lines that raise an error for users, and say nothing of what to do."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        called = node.exc.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in USER_ERRORS and all(keyword.arg != "hint" for keyword in node.exc.keywords):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_an_error_says_what_to_do(path: Path) -> None:
    assert raises_without_hint(path.read_text(encoding="utf-8")) == []


def test_an_error_without_a_hint_is_found() -> None:
    assert raises_without_hint("raise InputError('bad')\nraise InputError('bad', hint='mend')") == [
        1
    ]
    assert raises_without_hint("raise errors.PleexportError('bad')") == [1]
    assert raises_without_hint("raise ValueError('ours')") == []


def test_a_message_shows_what_a_file_holds_as_escapes() -> None:
    error = errors.BundleError("no `a\0\x1b[31m\ud800é`:\n\nat\n  - b", hint="x\u2028y")
    assert error.message == str(error) == r"no `a\x00\x1b[31m\ud800é`: at" + "\n  - b"
    assert error.hint == r"x\u2028y"


def test_a_message_shows_both_ends_of_what_is_very_long() -> None:
    error = errors.BundleError(f"`{'a' * 100_000}` is unknown", hint="y" * 1000)
    assert error.message == f"`{'a' * 399} [99213 characters] {'a' * 388}` is unknown"
    assert error.hint == "y" * 1000
