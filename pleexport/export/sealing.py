"""Make a bundle of a folder of files: their digests, the manifest."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pleexport.checksums import (
    checksums_of,
    sha256_and_checksums,
    write_checksums,
)
from pleexport.parallel import map_in_order
from pleexport.runtime.bundle import MANIFEST, FileRecord, Manifest


def seal(folder: Path, manifest: Manifest) -> None:
    """Hash every file of the folder, once, and write manifest and checksums as the last files."""
    paths = sorted(folder.iterdir())
    records, checksums = [], {}
    for path, (digest, chunks) in zip(
        paths, map_in_order(sha256_and_checksums, paths), strict=True
    ):
        records.append(FileRecord(path.name, path.stat().st_size, digest))
        checksums[path.name] = chunks
    encoded = msgspec.json.encode(msgspec.structs.replace(manifest, files=records))
    written = msgspec.json.format(encoded, indent=2) + b"\n"
    (folder / MANIFEST).write_bytes(written)
    write_checksums(folder, checksums | {MANIFEST: checksums_of(written)})
