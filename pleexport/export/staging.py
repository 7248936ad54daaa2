"""Put a folder in its place all at once, whatever interrupts: nothing half-written looks whole.

A folder is written beside its place, under a hidden name and a lock that ends with the process.
Then it is synced, and changes places with what was there. What a killed process leaves is removed
by the next one, which takes the lock.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pleexport.checksums import CHECKSUMS
from pleexport.errors import BundleError
from pleexport.runtime.bundle import MANIFEST, read_manifest

_OLD = "-old"
# Source: Linux, renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staging_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A sibling of `out` that takes its place on success and is removed on any failure.

    Raises:
        BundleError: `out` exists and may not be replaced.
    """
    out = out.resolve()  # a link to a bundle stays a link, and `.` has a name
    prefix = f".{out.name}.partial-"
    _clean_up(out, prefix)
    check_replaceable(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    except OSError as err:
        raise BundleError(
            f"`{out.parent}` is no folder that can be written to: {err.strerror}",
            hint="choose another folder with `--out`",
        ) from err
    with _locked(staging):
        try:
            yield staging
            staging.chmod(0o755)
            _sync(staging)
            check_replaceable(out, overwrite=overwrite)  # again: a build takes its time
            _put(staging, out)
            _sync_one(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, out: Path) -> None:
    """Put a folder in its place; what was there is at `staging` then, if anything."""
    if not out.exists():
        staging.rename(out)
    elif not _exchange(staging, out):
        # Without a system that exchanges two names there is a moment without either; a process that
        # is killed in it leaves the old one to `_clean_up`.
        retired = staging.with_name(staging.name + _OLD)
        out.rename(retired)
        try:
            staging.rename(out)
        except BaseException:
            retired.rename(out)
            raise
        shutil.rmtree(retired)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    done: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


def _clean_up(out: Path, prefix: str) -> None:
    """Remove what killed processes left, and bring back a bundle that one had set aside."""
    if not out.parent.is_dir():
        return
    for left in sorted(out.parent.iterdir()):
        if not left.name.startswith(prefix) or left.is_symlink() or not left.is_dir():
            continue
        with _locked(left) as ours:
            if not ours:
                continue  # another build is at work
            if left.name.endswith(_OLD) and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which ends with the process; whether nobody else has it."""
    try:
        import fcntl
    except ImportError:  # Windows: leave alone what may be another's
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except OSError:
        ours = False
    try:
        yield ours
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Let a folder and its files reach the disk."""
    for path in folder.iterdir():
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    """Let a file, or a folder's list of names, reach the disk.

    Source: fsync(2): a file's name is on the disk when its folder is synced too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
