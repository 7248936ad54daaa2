"""A folder or a file takes its place all at once: nothing half-written looks whole.

It is written beside its place, under a hidden name and a lock that ends with the process. Then it
is synced, and changes places with what was there. What a killed process leaves is removed by the
next one, which takes the lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pleexport.errors import PleexportError

_PARTIAL, _OLD = ".partial-", "-old"
_SCRATCH = "pleexport-scratch-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Source: Linux, renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged_folder(
    place: Path,
    *,
    error: type[PleexportError],
    elsewhere: str,
    check: Callable[[], object] | None = None,
    prefix: str | None = None,
) -> Iterator[Path]:
    """A hidden sibling of `place` that takes its place on success and is removed on any failure.

    Args:
        error: is raised where the disk fails or is full.
        elsewhere: what to do then, as a clause.
        check: raises where `place` may not be taken, and is called before the work and after it;
            None leaves what is there when the work is done, since it is as good.
        prefix: of hidden names, where folders of many names are to clean up after each other.
    Raises:
        PleexportError: `error`.
    """
    place = followed(place)  # a link to a folder stays a link, and `.` has a name
    prefix = prefix or f".{place.name}{_PARTIAL}"
    _clean_up(place.parent, prefix, place=place)
    if check:
        check()
    with (
        _disk_errors(place, prefix, error=error, elsewhere=elsewhere),
        _partial(place.parent, prefix, error=error, elsewhere=elsewhere) as staging,
    ):
        yield staging
        staging.chmod(0o755)
        for path in [*staging.rglob("*"), staging]:
            _sync(path)
        if check:
            check()  # again: the work takes its time
            _replace(staging, place)
        elif not place.is_dir():
            _take(staging, place)


@contextmanager
def staged_file(place: Path, *, error: type[PleexportError], elsewhere: str) -> Iterator[Path]:
    """A hidden sibling of `place`, an empty file that takes its place; see `staged_folder`."""
    prefix = f".{place.name}{_PARTIAL}"
    _clean_up(place.parent, prefix, folders=False)
    with (
        _disk_errors(place, prefix, error=error, elsewhere=elsewhere),
        _partial(place.parent, prefix, error=error, elsewhere=elsewhere, folder=False) as staging,
    ):
        yield staging
        staging.chmod(0o644)
        _sync(staging)
        staging.replace(place)
        _sync(place.parent)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for files that nobody needs afterwards, where the system keeps such."""
    parent = Path(tempfile.gettempdir())
    _clean_up(parent, _SCRATCH)
    choose = "set `TMPDIR` to another folder"
    with _partial(parent, _SCRATCH, error=PleexportError, elsewhere=choose) as folder:
        yield folder


def followed(path: Path) -> Path:
    """Where a path leads, through links; one that leads to itself stays a link.

    `Path.resolve` raises there, or not, depending on Python's version.
    """
    return Path(os.path.realpath(path))


def is_partial(name: str) -> bool:
    """Whether a file or folder has the hidden name of one that is not whole."""
    return name.startswith(".") and _PARTIAL in name


def is_of_disk(err: BaseException) -> bool:
    """Whether an error says that a disk is full or fails."""
    return isinstance(err, OSError) and err.errno in (*_FULL, errno.EIO, errno.EROFS)


@contextmanager
def _partial(
    parent: Path, prefix: str, *, error: type[PleexportError], elsewhere: str, folder: bool = True
) -> Iterator[Path]:
    """A new folder or file under a hidden name and a lock, which is removed at the end."""
    while True:
        try:
            _make_folders(parent)
            made = _make(parent, prefix, folder=folder)
        except OSError as err:
            raise error(
                f"`{parent}` is no folder that can be written to: {err.strerror}", hint=elsewhere
            ) from err
        with _locked(made) as ours:
            if ours is False or not made.exists():
                continue  # a process that cleans up was there before the lock
            try:
                yield made
            finally:
                _remove(made)
            return


def _make(parent: Path, prefix: str, *, folder: bool) -> Path:
    if folder:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=parent)
    os.close(descriptor)
    return Path(name)


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, their names on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


@contextmanager
def _disk_errors(
    place: Path, prefix: str, *, error: type[PleexportError], elsewhere: str
) -> Iterator[None]:
    """Say in one sentence that the disk is full or fails.

    What cannot be opened has a name, what is copied has two, and what cannot be written none.
    """
    hidden = str(place.parent / prefix)
    try:
        yield
    except OSError as err:
        names = [str(name) for name in (err.filename, err.filename2) if name]
        if names and not any(name.startswith(hidden) for name in names):
            raise
        first = "free some space" if err.errno in _FULL else "check the disk"
        raise error(
            f"`{place}` cannot be written: {(err.strerror or str(err)).lower()}",
            hint=f"{first}, or {elsewhere}",
        ) from err


def _replace(staging: Path, place: Path) -> None:
    """Put a folder in its place for good; what was there is at `staging` then, if anything."""
    there = place.exists()
    _swap(staging, place) if there else staging.rename(place)
    try:
        _sync(place.parent)
    except OSError:
        _swap(staging, place) if there else place.rename(staging)
        raise


def _take(staging: Path, place: Path) -> None:
    """Put a folder in its place, unless another process is faster."""
    try:
        staging.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    _sync(place.parent)


def _swap(staging: Path, place: Path) -> None:
    """Let two folders change places."""
    if _exchange(staging, place):
        return
    # Without a system that exchanges two names there is a moment without either; a process that is
    # killed in it leaves the old one to `_clean_up`.
    retired = staging.with_name(staging.name + _OLD)
    place.rename(retired)
    try:
        staging.rename(place)
    except BaseException:
        retired.rename(place)
        raise
    retired.rename(staging)


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


def _clean_up(
    parent: Path, prefix: str, *, place: Path | None = None, folders: bool = True
) -> None:
    """Remove what killed processes left, and bring back a folder that one had set aside."""
    if not parent.is_dir():
        return
    for left in sorted(parent.iterdir()):
        if not left.name.startswith(prefix) or left.is_symlink():
            continue
        if left.is_dir() != folders:
            continue
        with _locked(left) as ours:
            if not ours:
                continue  # another process is at work
            if place and left.name.endswith(_OLD) and not place.exists():
                left.rename(place)
            else:
                _remove(left)


@contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Hold a lock that ends with the process.

    Yields:
        whether it is ours; None where there are no such locks, so that nobody knows.
    """
    if sys.platform == "win32":
        yield None
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # removed meanwhile, or another's
        yield False
        return
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks
        return None
    return True


def _sync(path: Path) -> None:
    """Let a file, or a folder's list of names, reach the disk.

    Source: fsync(2): a file's name is on the disk when its folder is synced too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        if sys.platform != "win32":
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(descriptor)
