"""What a bundle gets to make ids of text: one tokenizer, as the original has read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pleexport.parity.original_text import OriginalText
from pleexport.parity.text import find_original_text
from pleexport.runtime.tokenizer import TOKENIZERS, tokenizer_files


@dataclass(frozen=True)
class TextFiles:
    """A tokenizer for a bundle.

    Attributes:
        files: by the names that the bundle gives them; empty where there is no tokenizer.
        original: what the bundle is compared with; None where transformers has nothing to compare.
        notes: what a user should know, as sentences.
    """

    files: dict[str, Path]
    original: OriginalText | None
    notes: list[str]


def text_files(place: Path, scratch: Path) -> TextFiles:
    """The tokenizer of a place.

    Where transformers cannot open it, the files are those of the place, as they are.

    Args:
        place: a folder, or a file: a tokenizer.json, or a vocabulary of RWKV's World tokenizer.
        scratch: a folder for files that are made.
    """
    original = find_original_text(place, scratch)
    if original and original.witness:
        return TextFiles(original.files, original, original.witness.notes)
    found, notes = tokenizer_files(place), []
    if original:
        there = found.keys() & set(TOKENIZERS)
        fate = "is copied as it is and compared with nothing" if there else "is left out"
        notes.append(
            f"the tokenizer at `{place}` {fate}, as transformers cannot open it "
            f"({original.problem})"
        )
    return TextFiles(found, original, notes)
