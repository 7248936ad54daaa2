"""Write a bundle where nothing half-written can be taken for one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from pleexport.checksums import (
    CHECKSUMS,
    checksums_of,
    sha256_and_checksums,
    write_checksums,
)
from pleexport.errors import BundleError
from pleexport.parallel import map_in_order
from pleexport.runtime.bundle import MANIFEST, FileRecord, Manifest, read_manifest


@contextmanager
def staging_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A sibling of `out` that is renamed to it on success and removed on any failure.

    Raises:
        BundleError: `out` exists and may not be replaced.
    """
    out = out.resolve()  # a link to a bundle stays a link, and `.` has a name
    check_replaceable(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as err:
        raise BundleError(
            f"`{out.parent}` is no folder that can be written to: {err.strerror}",
            hint="choose another folder with `--out`",
        ) from err
    try:
        yield staging
        staging.chmod(0o755)
        check_replaceable(out, overwrite=overwrite)  # again: a build takes its time
        if out.exists():
            retired = staging.with_name(staging.name + "-old")
            out.rename(retired)
            try:
                staging.rename(out)
            except BaseException:
                retired.rename(out)
                raise
            shutil.rmtree(retired)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything but an empty folder or, when told to, a bundle.

    Raises:
        BundleError: `out` exists and may not be replaced.
    """
    if out.resolve() == Path.cwd():
        raise BundleError(
            "the current folder cannot be replaced by a bundle",
            hint="go one up, or choose another folder with `--out`",
        )
    if not out.exists() or (out.is_dir() and not os.listdir(out)):
        return
    try:
        manifest = read_manifest(out)
    except BundleError as err:
        raise BundleError(
            f"`{out}` exists and is not a bundle that this version reads",
            hint="choose another folder with `--out`; nothing was changed",
        ) from err
    if not overwrite:
        raise BundleError(
            f"`{out}` holds a bundle already",
            hint="pass `--overwrite` to replace it, or choose another folder with `--out`",
        )
    foreign = sorted(
        set(os.listdir(out)) - {record.name for record in manifest.files} - {MANIFEST, CHECKSUMS}
    )
    if foreign:
        raise BundleError(
            f"`{out}` holds a bundle and other things, `{foreign[0]}` first",
            hint="move them away, or choose another folder with `--out`; nothing was changed",
        )
