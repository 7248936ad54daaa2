"""Make a bundle of a folder of files: their digests, the manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from pleexport.checksums import (
    Checksums,
    checksums_of,
    sha256_and_checksums,
    write_checksums,
)
from pleexport.parallel import map_in_order
from pleexport.runtime.bundle import MANIFEST, FileRecord, Manifest


def seal(
    folder: Path, manifest: Manifest, *, progress: Callable[[int], object] = lambda _: None
) -> tuple[Manifest, Checksums]:
    """Hash every file of the folder, once, and write manifest and checksums as the last files.

    Args:
        progress: called with the number of bytes read since its last call, from any thread.
    Returns:
        what was written.
    """
    paths = sorted(folder.iterdir())
    records, checksums = [], {}
    hashed = map_in_order(partial(sha256_and_checksums, progress=progress), paths)
    for path, (digest, chunks) in zip(paths, hashed, strict=True):
        records.append(FileRecord(path.name, path.stat().st_size, digest))
        checksums[path.name] = chunks
    sealed = msgspec.structs.replace(manifest, files=records)
    written = msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"
    (folder / MANIFEST).write_bytes(written)
    files = checksums | {MANIFEST: checksums_of(written)}
    write_checksums(folder, files)
    return sealed, Checksums(files=files)
