"""A bundle takes its place whole, and nothing is lost, wherever a process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pleexport import staging
from pleexport.errors import BundleError, CheckpointError, InputError
from pleexport.staging import scratch_folder, staged_file, staged_folder

# Writes a bundle's worth of files to the place of an older one, and is killed on the way.
KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from pleexport import errors, staging

def die(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGKILL)

point, out = sys.argv[1], Path(sys.argv[2])
if "no exchange" in point:
    staging._exchange = lambda first, second: False
if "synced" in point:
    staging._sync = die
if "put" in point:
    staging._replace = die
if "old removed" in point:
    staging.shutil.rmtree = die
if "between" in point:
    rename = Path.rename
    Path.rename = lambda self, to: rename(self, to) if "-old" in str(to) else die()
with staging.staged_folder(
    out, error=errors.BundleError, elsewhere="", check=lambda: None
) as folder:
    (folder / "file").write_text("new")
    if point == "written":
        die()
"""


def staged(out: Path) -> AbstractContextManager[Path]:
    return staged_folder(out, error=BundleError, elsewhere="go elsewhere", check=lambda: None)


@pytest.mark.parametrize(
    ("point", "kept"),
    [
        ("written", "old"),
        ("synced", "old"),
        ("put", "old"),
        ("old removed", "new"),
        ("between, no exchange", "old"),
        ("old removed, no exchange", "new"),
    ],
)
def test_a_killed_process_leaves_one_bundle_and_the_next_cleans_up(
    point: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, point, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"out"}
    assert all(name.startswith(".out.partial-") for name in left)
    if "between" not in point:
        assert (out / "file").read_text() == kept
    with staged(out) as folder:
        assert (out / "file").read_text() == kept
        (folder / "file").write_text("newest")
    assert (out / "file").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_of_a_build_at_work_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as first:
        with staged(tmp_path / "out"):
            assert first.is_dir()
            (first / "file").write_text("still here")
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "still here"


def test_what_only_looks_like_a_left_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".out.partial-file").write_text("mine")
    with staged(tmp_path / "out"):
        pass
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"elsewhere", ".out.partial-link", ".out.partial-file", "out"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, and when something takes its place."""
    found: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def record_sync(descriptor: int) -> None:
        found.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def record(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def put(path: Path, to: Path) -> Path:
            found.append(f"put {to.name}")
            return real(path, to)

        return put

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record(rename))
    monkeypatch.setattr(Path, "replace", record(replace))
    return found


def test_everything_is_synced_before_it_takes_its_place(tmp_path: Path, calls: list[str]) -> None:
    with staged(tmp_path / "new" / "parents" / "out") as folder:
        (folder / "weights").write_text("w")
        (folder / "manifest.json").write_text("m")
        calls.append("written")
    made, at_the_end = calls[: calls.index("written")], calls[calls.index("written") + 1 :]
    # The names of the folders that were made lie in those above them.
    assert set(made) == {"sync new", f"sync {tmp_path.name}"}
    assert set(at_the_end[:2]) == {"sync weights", "sync manifest.json"}
    assert at_the_end[2:] == [f"sync {folder.name}", "put out", "sync parents"]


def test_a_file_is_synced_before_it_takes_its_place(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "file").write_text("old")
    with staged_file(tmp_path / "file", error=CheckpointError, elsewhere="") as staging:
        staging.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert calls == [f"sync {staging.name}", "put file", f"sync {tmp_path.name}"]
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_there_meanwhile_is_left_where_it_is_as_good(tmp_path: Path) -> None:
    def kept(text: str) -> AbstractContextManager[Path]:
        return staged_folder(tmp_path / "out", error=InputError, elsewhere="")

    with kept("slow") as slow:
        (slow / "file").write_text("slow")
        with kept("fast") as fast:
            (fast / "file").write_text("fast")
    assert (tmp_path / "out" / "file").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_cleaned_up_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = staging._make

    def made_and_lost(parent: Path, prefix: str, *, folder: bool) -> Path:
        made.append(make(parent, prefix, folder=folder))
        if len(made) == 1:
            staging._clean_up(parent, prefix)
        return made[-1]

    monkeypatch.setattr(staging, "_make", made_and_lost)
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert len(made) == 2
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("failing", ["sync", "sync of the parent", "rename"])
def test_a_disk_that_fails_leaves_what_was_there(
    failing: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "file").write_text("old")
    fsync = os.fsync

    def fail(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    def fail_on_parent(descriptor: int) -> None:
        here = os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path)
        fail() if here else fsync(descriptor)

    if failing == "rename":
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fail() if to == out else os.rename(self, to)
        )
    else:
        monkeypatch.setattr(os, "fsync", fail if failing == "sync" else fail_on_parent)
    with pytest.raises(BundleError) as caught, staged(out) as new:
        (new / "file").write_text("new")
    assert caught.value.message == f"`{out}` cannot be written: input/output error"
    assert caught.value.hint == "check the disk, or go elsewhere"
    monkeypatch.undo()
    if failing == "rename" and there:  # the disk takes no name back either: the next build does
        with pytest.raises(BundleError), staged(out):
            raise BundleError("no", hint="no")
    assert not there or (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there


def test_a_full_disk_is_said_so_and_another_error_is_not_its(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught, staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (
        caught.value.message == f"`{tmp_path / 'out'}` cannot be written: no space left on device"
    )
    assert caught.value.hint == "free some space, or go elsewhere"
    # What is copied has two names, that of the original first.
    with pytest.raises(BundleError, match="no space left"), staged(tmp_path / "out") as folder:
        raise OSError(errno.ENOSPC, "No space left", "original", None, str(folder / "copy"))
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out"):
        (tmp_path / "checkpoint").read_text()


def test_scratch_that_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal, tempfile; tempfile.tempdir = {!r}\n"
        "from pleexport.staging import scratch_folder\n"
        "with scratch_folder() as folder:\n    (folder / 'file').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code.format(str(tmp_path))], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []
