"""The small files of a checkpoint: what says how a model and its tokenizer work, and licences.

They end up in bundles, as they are or as what a tokenizer has become. So one that is a link out of
its folder is refused: it would carry a file of this machine into what is given to others.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

from pleexport.errors import CheckpointError
from pleexport.staging import followed

LICENCES = ("LICENSE*", "NOTICE*")
# Where a checkpoint has templates beside its own.
MORE_TEMPLATES = "additional_chat_templates"
_PATTERNS = (
    *("*.json", "*.jinja", f"{MORE_TEMPLATES}/*.jinja", "*.model"),
    *("*vocab*.txt", "merges.txt", *LICENCES),
)
# Where the cache of the hub has the files that its snapshots link to.
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def is_text_file(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is one of these."""
    return any(matches(name, pattern) for pattern in _PATTERNS)


def licences(folder: Path) -> dict[str, Path]:
    """A checkpoint's licence and notices, by name."""
    found = (path for pattern in LICENCES for path in folder.glob(pattern) if path.is_file())
    return {path.name: path for path in sorted(found)}


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder where one of these files is a link to somewhere else.

    Raises:
        CheckpointError: names the first, and where it leads.
    """
    # Looked for where `folder` really is, since it may be a link itself.
    folder = folder.resolve()
    for path in sorted([*folder.glob("*"), *folder.glob(f"{MORE_TEMPLATES}/*")]):
        if not is_text_file(path.relative_to(folder).as_posix()):
            continue
        target = followed(path)
        if not target.is_relative_to(folder) and target.parent != _cached(folder):
            raise CheckpointError(
                f"`{path}` is a link out of its folder, to `{target}`, and what that holds would "
                "go into the bundle",
                hint="put a copy of the file in place of the link if it belongs to the model",
            )


def _cached(folder: Path) -> Path | None:
    """Where the files are that a snapshot in the hub's cache links to."""
    snapshots = folder.parent
    return snapshots.parent / _BLOBS if snapshots.name == _SNAPSHOTS else None


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern, as in a shell: a star passes no slash."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern)
