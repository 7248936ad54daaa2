"""What can go wrong, as exceptions whose text a user can act on.

PleexportError              exit code 2: wrong usage or input
├── CheckpointError         the checkpoint is incomplete, damaged or inconsistent
├── UnsupportedError        the checkpoint asks for something that is not implemented
├── TargetError             the target is unknown, malformed, or the build does not fit it
├── BundleError             the folder is not a bundle, or not one that this version reads
├── BlobError               the blob breaks a rule of docs/blob-format.md
├── TokenizerError          a tokenizer's files are malformed
├── InputError              a prompt, id, text or option that cannot be used
├── FamilyError             a family contradicts itself; for those who write one
├── MissingDependencyError  an optional dependency is not installed
└── CheckFailed             exit code 1: parity or integrity check failed
"""

from __future__ import annotations

import re

# What a name or value from a file may hold, and a terminal would obey; a list begins a new line.
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST_LINE = 1000
_SHOWN_OF_LONG = 400
# The hint where a graph or program of a bundle cannot be loaded or run.
VERIFY_HINT = "`pleexport verify BUNDLE` tells whether its files are damaged"


class PleexportError(Exception):
    """Base of all errors that are shown to users as one sentence.

    Names and values in it may come from files that nobody trusts: what cannot be printed is written
    as an escape, and of a very long line both ends are shown.

    Args:
        message: what is wrong, where, and what was expected.
        hint: what to do about it, if anything is known to help.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _printable(message)
        self.hint = hint and _printable(hint)
        super().__init__(self.message)


def escaped(text: str) -> str:
    """A text in which what a terminal would obey, and what UTF-8 has no place for, is escaped."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def escaped_json(text: str) -> str:
    """The same JSON, with its own escapes."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def _printable(text: str) -> str:
    """A text of as many lines as it has items: a break before anything else is a space."""
    text = re.sub(r"\s*\n(?!  )\s*", " ", text).strip()
    return "\n".join(map(_shortened, escaped(text).split("\n")))


def _shortened(line: str) -> str:
    if len(line) <= _LONGEST_LINE:
        return line
    left_out = len(line) - 2 * _SHOWN_OF_LONG
    return f"{line[:_SHOWN_OF_LONG]} [{left_out} characters] {line[-_SHOWN_OF_LONG:]}"


class CheckpointError(PleexportError):
    """The checkpoint is incomplete, damaged or inconsistent."""


class UnsupportedError(PleexportError):
    """The checkpoint asks for something that is not implemented."""


class TargetError(PleexportError):
    """The target is unknown or malformed, or the build does not fit it."""


class BundleError(PleexportError):
    """The folder is not a bundle, or not one that this version reads."""


class BlobError(PleexportError):
    """The blob breaks a rule of docs/blob-format.md."""


class TokenizerError(PleexportError):
    """A tokenizer's files are malformed."""


class InputError(PleexportError):
    """A prompt, id, text or option that cannot be used."""


class FamilyError(PleexportError):
    """A family contradicts itself: what it declares is not what it computes with."""


class MissingDependencyError(PleexportError):
    """An optional dependency is not installed."""


class CheckFailed(PleexportError):
    """A parity or integrity check failed."""

    exit_code = 1
