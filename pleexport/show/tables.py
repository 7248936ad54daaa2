"""Tables and paragraphs as plain text."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import IO, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = 100
_SENTENCE_COLUMNS = 96
_NO_BREAK = "\u00a0"
_JUSTIFY: dict[str, Literal["left", "right"]] = {"<": "left", ">": "right"}


def aligned(rows: Iterable[Sequence[str]], *, align: str, indent: int = 0) -> list[str]:
    """Rows of cells as aligned lines of at most `COLUMNS`; what is too long goes on in its cell.

    Args:
        align: "<" or ">" for each column.
        indent: spaces before each line.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for side in align:
        table.add_column(justify=_JUSTIFY[side], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    file = io.StringIO()
    _plain_console(file, columns=COLUMNS - indent).print(table)
    return [(" " * indent + line).rstrip() for line in file.getvalue().splitlines()]


def _plain_console(file: IO[str], *, columns: int) -> Console:
    """A console that asks neither terminal nor environment: what is piped is what is shown.

    With FORCE_COLOR and TERM=dumb, say, rich takes any file for a terminal of 80 columns.
    """
    return Console(
        file=file,
        width=columns,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )


def paragraph(sentence: str) -> list[str]:
    """A sentence as an item of a list, in lines that end before `COLUMNS`."""
    # A number and its unit stay on one line.
    joined = re.sub(r"(?<=\d) (?=[GMk]?B\b)", _NO_BREAK, sentence)
    lines = textwrap.wrap(
        joined,
        _SENTENCE_COLUMNS,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]
