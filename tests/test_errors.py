"""Every error that a user can meet says what to do."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pleexport
from pleexport import cli, errors

PACKAGE = Path(pleexport.__path__[0])
MODULES = sorted(PACKAGE.rglob("*.py"))
USER_ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.PleexportError)
}


def errors_without_hint(source: str) -> list[int]:
    """Lines that make an error for users, raised there or not, and may say nothing of what to do.

    A class of errors may be handed on as an argument or attribute (`type[PleexportError]`), and so
    may a hint: one that can be None is as good as none.
    """
    tree = ast.parse(source)
    arguments = [node for node in ast.walk(tree) if isinstance(node, ast.arg)]
    classes = USER_ERRORS | {a.arg for a in arguments if _is_class_of_errors(a.annotation)}
    lines = []
    for call, maybe_none in _calls(tree, set()):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else _name(call.func)
        if name in classes or name.removeprefix("_") in classes - USER_ERRORS:
            hint = next((k.value for k in call.keywords if k.arg == "hint"), None)
            if hint is None or _may_be_empty(hint, maybe_none):
                lines.append(call.lineno)
    return sorted(lines)


def _calls(node: ast.AST, maybe_none: set[str]) -> Iterator[tuple[ast.Call, set[str]]]:
    """Every call, with the arguments of the functions around it that may be None."""
    if isinstance(node, ast.FunctionDef):
        own = [*node.args.args, *node.args.kwonlyargs]
        optional = {a.arg for a in own if a.annotation and "None" in ast.unparse(a.annotation)}
        maybe_none = (maybe_none - {a.arg for a in own}) | optional
    if isinstance(node, ast.Call):
        yield node, maybe_none
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, maybe_none)


def _may_be_empty(hint: ast.expr, maybe_none: set[str]) -> bool:
    if isinstance(hint, ast.IfExp):
        return any(_may_be_empty(part, maybe_none) for part in (hint.body, hint.orelse))
    if isinstance(hint, ast.BoolOp) and isinstance(hint.op, ast.Or):
        return _may_be_empty(hint.values[-1], maybe_none)
    if isinstance(hint, ast.BoolOp):
        return True
    return _name(hint) in maybe_none or (isinstance(hint, ast.Constant) and not hint.value)


def _is_class_of_errors(annotation: ast.expr | None) -> bool:
    said = ast.unparse(annotation) if annotation else ""
    return any(re.search(rf"\btype\[(errors\.)?{name}\]", said) for name in USER_ERRORS)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_an_error_says_what_to_do(path: Path) -> None:
    assert errors_without_hint(path.read_text(encoding="utf-8")) == []


def test_every_error_of_every_module_is_looked_at() -> None:
    made = re.compile(rf"(?<!class )\b(?:{'|'.join(USER_ERRORS)})\(")
    counts = []
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        found = errors_without_hint(re.sub(r"\bhint=", "advice=", source))
        counts.append(len(found))
        assert len(found) >= len(made.findall(source)), path
    assert sum(counts) > 250


def test_errors_for_users_have_one_name_and_one_place() -> None:
    for path in MODULES:
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        bases = [b for n in nodes if isinstance(n, ast.ClassDef) for b in n.bases]
        imported = [a for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
        assert not [a for a in imported if a.name in USER_ERRORS and a.asname], path
        if path.name != "errors.py":
            assert not USER_ERRORS & {ast.unparse(b).split(".")[-1] for b in bases}, path


@pytest.mark.parametrize(
    "source",
    [
        "raise InputError('bad')",
        "raise errors.PleexportError('bad')",
        "raise InputError('bad') from err",
        "raise InputError('bad', hint=None)",
        "raise InputError('bad', hint='')",
        "raise InputError('bad', hint='mend' if known else None)",
        "raise InputError('bad', hint=known and 'mend')",
        "raise InputError('bad', hint=known or None)",
        "def broken(what): return BundleError(what)",
        "problem = BundleError('bad')",
        "def fail(what: str, hint: str | None = None): raise InputError(what, hint=hint)",
        "def disk(error: type[PleexportError]): raise error('full')",
        "def __init__(self, *, error: type[errors.PleexportError]): raise self._error('bad')",
    ],
)
def test_an_error_without_a_hint_is_found(source: str) -> None:
    assert errors_without_hint(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "raise InputError('bad', hint='mend')",
        "raise InputError('bad', hint=MEND)",
        "raise InputError('bad', hint='mend' if known else f'{MEND}')",
        "raise InputError('bad', hint=known or 'mend')",
        "def fail(what: str, hint: str = 'mend'): return InputError(what, hint=hint)",
        "raise self._fail('bad')",
        "raise ValueError('ours')",
    ],
)
def test_an_error_with_a_hint_is_left_alone(source: str) -> None:
    assert errors_without_hint(source) == []


def test_a_message_shows_what_a_file_holds_as_escapes() -> None:
    error = errors.BundleError("no `a\0\x1b[31m\ud800é`:\n\nat\n  - b", hint="x\u2028y")
    assert error.message == str(error) == r"no `a\x00\x1b[31m\ud800é`: at" + "\n  - b"
    assert error.hint == r"x\u2028y"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_command_shows_of_a_file_is_escaped(
    as_json: bool,
    gemma4_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(gemma4_checkpoint, tmp_path / "checkpoint"))
    odd = b'{"\xed\xa0\x80\\u001b[31m\x7f": 1}'
    (folder / "generation_config.json").write_bytes(odd)
    arguments = ["pleexport", "inspect", str(folder), *(["--json"] if as_json else [])]
    monkeypatch.setattr(sys, "argv", arguments)
    with suppress(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert r"\ud800" in said
    assert not any(c in said for c in "\x1b\x7f")
    if as_json:
        assert "\ud800\x1b[31m\x7f" in json.loads(said)["notes"][-1]


def test_a_message_shows_both_ends_of_what_is_very_long() -> None:
    error = errors.BundleError(f"`{'a' * 100_000}` is unknown", hint="y" * 1000)
    assert error.message == f"`{'a' * 399} [99213 characters] {'a' * 388}` is unknown"
    assert error.hint == "y" * 1000
