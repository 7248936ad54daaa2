"""Regular expressions that come with a checkpoint or an adapter, matched within a limit of time.

Some take longer than anybody waits, even on a short name. `regex` reads what `re` reads, and stops.
"""

from __future__ import annotations

from typing import Any

import regex

from pleexport.errors import CheckpointError

# A name of a module takes microseconds, whatever a trainer writes.
_SECONDS = 0.25


def check_pattern(pattern: str, where: str, *, hint: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        CheckpointError: names it.
    """
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as err:
        raise CheckpointError(
            f"{where}: `{pattern}` is no regular expression: {err}", hint=hint
        ) from err


def match(pattern: str, name: str) -> Any:
    """As `re.match`.

    Raises:
        CheckpointError: it takes too long, or is no regular expression.
    """
    return _within(regex.match, pattern, name)


def search(pattern: str, name: str) -> Any:
    """As `re.search`.

    Raises:
        CheckpointError: it takes too long, or is no regular expression.
    """
    return _within(regex.search, pattern, name)


def _within(function: Any, pattern: str, name: str) -> Any:
    try:
        return function(pattern, name, timeout=_SECONDS)
    except regex.error as err:  # a reference to a group can be right alone, and wrong in another
        raise CheckpointError(
            f"the pattern `{pattern}` of the config is no regular expression: {err}",
            hint="write it without references to its groups in a copy of the config",
        ) from err
    except TimeoutError as err:
        raise CheckpointError(
            f"the pattern `{pattern}` of the config takes more than {_SECONDS} s on `{name}`",
            hint="write it without a repetition inside of a repetition in a copy of the config",
        ) from err
