"""A folder in which one input at a time is tried, and what is found around it afterwards."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

# A cache that torch makes in the folder of temporary files when it traces, whatever it traces.
_OF_TORCH = "torchinductor_"
_EMPTY = ("home", "tmp", "here")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events that change files, with the positions of their paths.
_CHANGES = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
}
_NEVER = ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn")


class Sandbox:
    """The surroundings of an input, with the streams of this process caught.

    Attributes:
        folder: holds `case`, the input; `out`, where a build may write; and what must stay empty.
    """

    def __init__(self, folder: Path, bases: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        for name in (*_EMPTY, "case"):
            (folder / name).mkdir(parents=True)
        (folder / "outside.bin").write_bytes(b"outside" * 1000)
        (folder / "bases").symlink_to(bases)
        os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        os.environ |= {"XDG_CACHE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        os.environ |= {"HF_HOME": str(folder / "home"), "NO_COLOR": "1"}
        tempfile.tempdir = None
        os.chdir(folder / "here")
        self._streams = [os.memfd_create(name) for name in ("stdout", "stderr")]
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, caught in zip((1, 2), self._streams, strict=True):
            os.dup2(caught, number)
        self._watching = False
        self._broken: list[str] = []
        sys.addaudithook(self._hear)

    @property
    def case(self) -> Path:
        """Where an input is put."""
        return self.folder / "case"

    def begin(self) -> None:
        """Watch from now on."""
        self._before = _names(self.case)
        self._broken = []
        self._watching = True

    def end(self) -> list[str]:
        """What was written where nothing may be; the sandbox is empty again then."""
        self._watching = False
        found = list(dict.fromkeys(self._broken))
        for name in _EMPTY:
            left = [n for n in os.listdir(self.folder / name) if not n.startswith(_OF_TORCH)]
            found += [f"left `{name}/{n}`" for n in left]
        allowed = {*_EMPTY, "case", "out", "packed", "outside.bin", "bases"}
        found += [f"left `{n}`" for n in os.listdir(self.folder) if n not in allowed]
        if _names(self.case) != self._before:
            found.append("changed the input")
        packed = self.folder / "packed"
        if packed.is_dir():
            found += [f"left `packed/{n}`" for n in os.listdir(packed) if n.startswith(".")]
        self.clear()
        return found

    def clear(self) -> None:
        """Remove what is left of an input."""
        for path in self.folder.iterdir():
            if path.name in {"outside.bin", "bases"}:
                continue
            if path.name in {"case", *_EMPTY}:
                with os.scandir(path) as entries:
                    for entry in entries:
                        _remove(Path(entry.path))
            else:
                _remove(path)

    def said(self) -> tuple[str, str]:
        """What went to standard output and to standard error since the last call."""
        sys.stdout.flush()
        sys.stderr.flush()
        found = []
        for number in self._streams:
            size = os.fstat(number).st_size
            found.append(os.pread(number, min(size, 1 << 20), 0).decode("utf-8", "replace"))
            if size:
                os.ftruncate(number, 0)
                os.lseek(number, 0, os.SEEK_SET)
        return found[0], found[1]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = arguments
            written = isinstance(mode, str) and any(c in mode for c in "wax+")
            if written or (isinstance(flags, int) and flags & _WRITES):
                self._check(path, "opened for writing")
        elif event in _CHANGES:
            for i in _CHANGES[event]:
                self._check(_place(arguments, i), event)
        elif event in _NEVER:
            self._broken.append(f"{event} {arguments[:2]!r}"[:200])

    def _check(self, path: Any, what: str) -> None:
        if isinstance(path, int):
            return
        place = os.path.abspath(os.fsdecode(path))
        own = str(self.folder)
        if what == "os.mkdir" and os.path.isdir(place):
            return  # which fails, or does nothing
        inside = place.startswith((f"{own}/out", f"{own}/.out.partial-", f"{own}/packed"))
        if not (inside or place.startswith(f"{own}/tmp/") or place == "/dev/null"):
            self._broken.append(f"{what}: {place.replace(own, 'sandbox')}"[:200])


def _place(arguments: tuple[Any, ...], i: int) -> Any:
    """A path of an event; a relative one may begin at an open folder, which is an integer."""
    path = arguments[i]
    if isinstance(path, int):
        return path
    folders = [a for a in arguments if type(a) is int and a > 2]
    if folders and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{folders[-1]}"), os.fsdecode(path))
    return path


def _names(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            found.append((entry.name, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
