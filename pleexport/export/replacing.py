"""What a build may replace."""

from __future__ import annotations

import os
from pathlib import Path

from pleexport.checksums import CHECKSUMS
from pleexport.errors import BundleError
from pleexport.runtime.bundle import MANIFEST, read_manifest


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
