"""Digests that tell one checkpoint from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.folder import CONFIG
from pleexport.parallel import map_in_order

_READ_BYTES = 1 << 20


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """The config and the weights of a checkpoint, or of the base that adapters are merged into.

    A family without a config has none.
    """
    config = [checkpoint.folder / CONFIG] if checkpoint.config else []
    return config + sorted(file.path for file in checkpoint.files)


def digests_of(
    files: Sequence[Path], *, progress: Callable[[int], object] = lambda _: None
) -> list[str]:
    """A digest of each file.

    Args:
        progress: called with the number of bytes read since its last call.
    """
    return list(map_in_order(lambda path: digest_of([path], progress=progress), files))


def digest_of(files: Sequence[Path], *, progress: Callable[[int], object] = lambda _: None) -> str:
    """A digest of the contents of files, one after the other."""
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
                progress(len(part))
    return f"xxh3-128:{digest.hexdigest()}"
