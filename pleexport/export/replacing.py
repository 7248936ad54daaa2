"""What a build, or a package, may replace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pleexport.checksums import CHECKSUMS
from pleexport.errors import BundleError
from pleexport.runtime.bundle import MANIFEST, read_manifest


def _files_of_bundle(out: Path) -> set[str]:
    """Names of what a bundle consists of."""
    return {record.name for record in read_manifest(out).files} | {MANIFEST, CHECKSUMS}


def check_replaceable(
    out: Path,
    *,
    overwrite: bool,
    what: str = "bundle",
    files_of: Callable[[Path], set[str]] = _files_of_bundle,
) -> None:
    """Refuse to replace anything but an empty folder or, when told to, one of its kind.

    Args:
        out: where links have been followed already.
        what: kind of the folder.
        files_of: paths below it of all that it consists of; raises `BundleError` where it is not
            of that kind.
    Raises:
        BundleError: `out` exists and may not be replaced.
    """
    if out == Path.cwd():
        raise BundleError(
            f"the current folder cannot be replaced by a {what}",
            hint="go one up, or choose another folder with `--out`",
        )
    if out.is_symlink():
        raise BundleError(
            f"`{out}` is a link to itself",
            hint="remove it, or choose another folder with `--out`",
        )
    if not out.exists() or (out.is_dir() and not os.listdir(out)):
        return
    try:
        own = files_of(out)
    except BundleError as err:
        raise BundleError(
            f"`{out}` exists and is not a {what} that this version reads",
            hint="choose another folder with `--out`; nothing was changed",
        ) from err
    if not overwrite:
        raise BundleError(
            f"`{out}` holds a {what} already",
            hint="pass `--overwrite` to replace it, or choose another folder with `--out`",
        )
    own |= {parent.as_posix() for name in own for parent in Path(name).parents}
    foreign = sorted({path.relative_to(out).as_posix() for path in out.rglob("*")} - own)
    if foreign:
        raise BundleError(
            f"`{out}` holds a {what} and other things, `{foreign[0]}` first",
            hint="move them away, or choose another folder with `--out`; nothing was changed",
        )
