"""Digests that tell one checkpoint from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.folder import CONFIG
from pleexport.parallel import map_in_order

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file that a model was read from; its name is that below the checkpoint's folder."""

    name: str
    size: int
    digest: str


def source_files(
    checkpoint: Checkpoint, *, progress: Callable[[int], object] = lambda _: None
) -> list[SourceFile]:
    """The config and the weights of a checkpoint, or of the base that adapters are merged into.

    Args:
        progress: called with the number of bytes read since its last call.
    """

    def record(path: Path) -> SourceFile:
        name = path.relative_to(checkpoint.folder).as_posix()
        return SourceFile(name, path.stat().st_size, digest_of([path], progress=progress))

    return list(map_in_order(record, _paths(checkpoint)))


def source_bytes(checkpoint: Checkpoint) -> int:
    """How much `source_files` reads."""
    return sum(path.stat().st_size for path in _paths(checkpoint))


def digest_of(files: Sequence[Path], *, progress: Callable[[int], object] = lambda _: None) -> str:
    """A digest of the contents of files, one after the other."""
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
                progress(len(part))
    return f"xxh3-128:{digest.hexdigest()}"


def _paths(checkpoint: Checkpoint) -> list[Path]:
    """A family without a config has none, and a file that is named alone has none to read."""
    config = [checkpoint.folder / CONFIG] if checkpoint.config else []
    return config + sorted(file.path for file in checkpoint.files)
