"""Tables and paragraphs as plain text."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wide enough for every table, so that none is ever folded.
_CONSOLE_COLUMNS = 400
COLUMNS = 96
_NO_BREAK = "\u00a0"
_JUSTIFY: dict[str, Literal["left", "right"]] = {"<": "left", ">": "right"}


def aligned(rows: Iterable[Sequence[str]], *, align: str, indent: int = 0) -> list[str]:
    """Rows of cells as aligned lines.

    Args:
        align: "<" or ">" for each column.
        indent: spaces before each line.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for side in align:
        table.add_column(justify=_JUSTIFY[side], no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # No terminal is asked: what is piped looks as what is shown.
    console = Console(file=io.StringIO(), width=_CONSOLE_COLUMNS, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [(" " * indent + line).rstrip() for line in captured.get().splitlines()]


def paragraph(sentence: str) -> list[str]:
    """A sentence as an item of a list, in lines of at most `COLUMNS`."""
    # A number and its unit stay on one line.
    joined = re.sub(r"(?<=\d) (?=[GMk]?B\b)", _NO_BREAK, sentence)
    lines = textwrap.wrap(
        joined,
        COLUMNS,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]
