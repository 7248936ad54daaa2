"""The verdict on an input: a result that nothing has changed, one sentence, or a finding."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pleexport.errors import FamilyError, PleexportError

from .cases import Case
from .exercise import Exit

# What the command line says when it fails, and nothing else: notes and steps with their times, then
# a sentence, which may end with a list of indented lines, and a hint.
_STEPS = r"((note: |warning: |[A-Z][a-zA-Z, ]+: [0-9.]+ )[^\n]*\n)*"
_FAILED = re.compile(_STEPS + r"error: [^\n]+\n(  [^\n]+\n)*(\nhint: [^\n]+\n)?\Z")
_NOTED = re.compile(_STEPS + r"\Z")
# The default logger of ONNX Runtime is the whole process's, so nobody silences it for a graph.
_OF_RUNTIME = re.compile(r"\x1b\[1;31m[^\x1b]*\[E:onnxruntime:Default, [^\x1b]*\x1b\[m\n?")
# A message is a sentence, or one with a list: nothing that a terminal obeys.
_UNPRINTABLE = re.compile(r"\n(?!  )|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST_LINE = 1000
SLACK_BYTES = 48 << 20
# What says something that depends on each byte that it reads.
_COMPARED = {"open", "run", "packed"}
# What a chat template may take: docs/security.md.
_TEMPLATE_BYTES = 300 << 20


@dataclass
class Tried:
    """What came of an input.

    Attributes:
        value: what was said, where nothing was raised.
        grown: bytes of memory at the worst moment, above what there was before.
        wrote: what was written where nothing may be.
    """

    value: Any = None
    raised: BaseException | None = None
    grown: int = 0
    stdout: str = ""
    stderr: str = ""
    wrote: list[str] = field(default_factory=list)
    out_exists: bool = False


def judge(case: Case, tried: Tried, honest: Tried | None) -> tuple[str, str | None]:
    """What became of an input, as a word, and what is wrong with that; None for nothing.

    Args:
        honest: what the same operation does with what nobody changed.
    """
    raised = tried.raised
    outcome = "success" if raised is None else type(raised).__name__
    if isinstance(raised, Exit):
        outcome = f"exit {raised.code}"
    problem = (
        _of_exception(raised)
        or _of_output(case, tried)
        or _of_surroundings(case, tried)
        or _of_result(case, tried, honest)
        or _of_memory(case, tried, honest)
    )
    return outcome, problem


def needs_comparison(case: Case, tried: Tried) -> bool:
    """Whether a verdict depends on what an unchanged base does."""
    same = tried.raised is None and not case.sealed and case.operation in _COMPARED
    return same or tried.grown > SLACK_BYTES


def signature(problem: str) -> str:
    """Findings with the same one are taken to be the same."""
    return re.sub(r"0x[0-9a-f]+|\d+|`[^`]*`|'[^']*'", "#", problem)[:300]


def _of_exception(raised: BaseException | None) -> str | None:
    if raised is None or isinstance(raised, Exit):
        return None
    if isinstance(raised, OSError) and isinstance(raised.filename, str):
        # The command line makes a sentence of it; a function may pass it on.
        return None if raised.strerror else _described(raised)
    if not isinstance(raised, PleexportError) or isinstance(raised, FamilyError):
        return _described(raised)
    for text in (raised.message, raised.hint or "x"):
        if not text.strip():
            return f"an empty message: {_described(raised)}"
        if found := _UNPRINTABLE.search(text):
            return f"the message has {found.group()!r} in it: {_described(raised)}"
        if max(map(len, text.split("\n"))) > _LONGEST_LINE:
            return f"the message is too long: {_described(raised)}"
    return None


def _described(raised: BaseException) -> str:
    """The kind of an exception and where it comes from."""
    frames = traceback.extract_tb(raised.__traceback__)
    ours = [f for f in frames if "/pleexport/" in f.filename]
    frame = (ours or frames or [None])[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" if frame else "nowhere"
    said = str(raised)[:300].encode("ascii", "backslashreplace").decode()
    return f"{type(raised).__name__} at {where}: {said}"


def _of_output(case: Case, tried: Tried) -> str | None:
    """Output that should not be; what a runtime logs of what is refused is known and no finding."""
    stderr = tried.stderr if tried.raised is None else _OF_RUNTIME.sub("", tried.stderr)
    if case.operation != "command":
        said = stderr or tried.stdout
        return f"output that nobody asked for: {said[:300]!r}" if said else None
    if tried.raised is None:
        good = _NOTED.match(stderr)
    else:
        assert isinstance(tried.raised, Exit)
        good = tried.raised.code in (1, 2) and _FAILED.match(stderr)
    return None if good else f"{tried.raised!r} with standard error {tried.stderr[-300:]!r}"


def _of_surroundings(case: Case, tried: Tried) -> str | None:
    if tried.wrote:
        return f"wrote where nothing may be: {'; '.join(tried.wrote)[:500]}"
    if tried.out_exists and tried.raised is not None:
        return "a build failed and left something in its place"
    return None


def _of_result(case: Case, tried: Tried, honest: Tried | None) -> str | None:
    if tried.raised is not None or honest is None or case.operation not in _COMPARED:
        return None
    if case.sealed or tried.value == honest.value:
        return None
    return "another result than that of the unchanged bundle, and no error"


def _of_memory(case: Case, tried: Tried, honest: Tried | None) -> str | None:
    if honest is None:
        return None
    size = sum(len(content) for content in case.changed.values() if content)
    allowed = 2 * honest.grown + 20 * size + SLACK_BYTES
    if case.operation in {"open", "run", "tokenizer", "packed", "unchecked", "build", "command"}:
        allowed += _TEMPLATE_BYTES if _changes_template(case) else 0
    if tried.grown <= allowed:
        return None
    return f"took {tried.grown >> 20} MB; an honest input takes {honest.grown >> 20} MB"


def _changes_template(case: Case) -> bool:
    return any(name in case.changed for name in ("chat_template.jinja", "tokenizer_config.json"))
