"""Change files of a bundle and make their checksums right again, as the docs have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

CHUNK = 1 << 20


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    raw = path.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def checksum(data: bytes) -> bytes:
    """As the file holds it."""
    return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the header says; all data stays where it is."""
    raw, header = path.read_bytes(), header_of(path)
    size = int.from_bytes(raw[:8], "little")
    change(header)
    text = json.dumps(header).encode().ljust(size)
    assert len(text) == size
    head = raw[:8] + text
    path.write_bytes(head + checksum(head) + raw[len(head) + 8 :])


def change_rows(path: Path, change: Callable[[Any], object]) -> None:
    """Change rows, given as an array `[num_rows, row_stride]`."""
    raw, entry = path.read_bytes(), header_of(path)["rows"]
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = (start + offset for offset in entry["data_offsets"])
    rows = np.frombuffer(raw[begin:end], np.uint8).reshape(entry["shape"]).copy()
    change(rows)
    sealed = b"".join(row[:-8].tobytes() + checksum(row[:-8].tobytes()) for row in rows)
    sums = b"".join(checksum(sealed[i : i + CHUNK]) for i in range(0, len(sealed), CHUNK))
    path.write_bytes(raw[:begin] + sealed + sums)


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a bundle, and make its checksum right again."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    change_checksums(bundle)


def fit_manifest(bundle: Path) -> None:
    """Let the manifest say the sizes and digests that files have now."""

    def fit(manifest: dict[str, Any]) -> None:
        for record in manifest["files"]:
            data = (bundle / record["name"]).read_bytes()
            record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    change_manifest(bundle, fit)


def change_checksums(bundle: Path) -> None:
    """Write `checksums.json` for the files that a bundle has now."""
    files = {}
    for path in sorted(bundle.iterdir()):
        if path.name != "checksums.json":
            data = path.read_bytes()
            chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
            files[path.name] = [f"{xxhash.xxh3_64_intdigest(chunk):016x}" for chunk in chunks]
    head = {"format": "pleexport-checksums", "version": 1, "chunk_bytes": CHUNK}
    (bundle / "checksums.json").write_text(json.dumps(head | {"files": files}))
