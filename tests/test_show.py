"""What people read: aligned, of bounded width, the same wherever it is printed."""

from __future__ import annotations

import pytest

from pleexport.show.tables import COLUMNS, aligned, paragraph

ROWS = [("", "tokens", "what"), ("prefill", "1,024", "[bold]at once[/] :rocket:"), ("a", "2", "b")]
LINES = [
    "           tokens  what",
    "  prefill   1,024  [bold]at once[/] :rocket:",
    "  a             2  b",
]


def test_aligned_puts_cells_below_each_other() -> None:
    assert aligned(ROWS, align="<><", indent=2) == LINES


@pytest.mark.parametrize(
    "environment",
    [
        {"FORCE_COLOR": "1", "TERM": "dumb"},
        {"TTY_COMPATIBLE": "1", "TERM": "unknown"},
        {"COLUMNS": "20", "LINES": "1"},
        {"NO_COLOR": "1"},
    ],
    ids=" ".join,
)
def test_aligned_asks_no_terminal(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = [("name" * 10, "1" * 10, "meaning " * 4)]
    expected = aligned([*ROWS, *wide], align="<><")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert aligned([*ROWS, *wide], align="<><") == expected
    assert max(map(len, expected)) == 40 + 2 + 10 + 2 + 31


def test_aligned_loses_nothing_of_what_is_too_long() -> None:
    name, meaning = "embed_tokens_per_layer" * 4, "looked up only: can leave memory; " * 4
    lines = aligned([(name, "123,456,789", meaning), ("b", "1", "")], align="<><", indent=2)
    assert max(map(len, lines)) <= COLUMNS
    text = "".join("".join(line.split()) for line in lines)
    assert sorted(text) == sorted((name + "123,456,789" + meaning + "b1").replace(" ", ""))
    assert not any(line.endswith(" ") for line in lines)


def test_paragraph_keeps_numbers_and_units_together() -> None:
    lines = paragraph("x" * 87 + " 12.5 GB are a lot")
    assert lines == ["  - " + "x" * 87, "    12.5 GB are a lot"]
