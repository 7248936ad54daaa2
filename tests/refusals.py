"""What the command lines of runtimes in other languages are asked: to refuse, in one sentence."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pleexport


def sentence_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that is said of a bundle that cannot be used; a hint follows."""
    assert done.returncode == 2, done.stdout + done.stderr
    sentence, empty, hint = done.stderr.strip().split("\n")
    assert (sentence[:7], empty, hint[:6]) == ("error: ", "", "hint: ")
    return sentence


def damaged_copies(whole: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """For each file of a bundle, its name, and a copy with a bit of it flipped.

    Of a blob it is a bit of the row of token id 5; other rows are compared when they are looked up.
    """
    names = {path.name for path in whole.iterdir()}
    assert {"tied.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    rows = pleexport.Bundle(whole).open_blob()
    for name in sorted(names):
        bundle = shutil.copytree(whole, folder, dirs_exist_ok=True)
        data = bytearray((bundle / name).read_bytes())
        place = rows.rows_offset + 5 * rows.row_stride + 9 if "embed" in name else len(data) - 9
        data[place] ^= 1
        (bundle / name).write_bytes(data)
        yield name, bundle
