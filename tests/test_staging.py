"""A bundle takes its place whole, and nothing is lost, wherever a process is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pleexport.errors import BundleError
from pleexport.export import staging
from pleexport.export.staging import staging_folder

# Writes a bundle's worth of files to the place of an older one, and is killed on the way.
KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from pleexport.export import staging

def die(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGKILL)

point, out = sys.argv[1], Path(sys.argv[2])
staging.check_replaceable = lambda out, overwrite: None
if "no exchange" in point:
    staging._exchange = lambda first, second: False
if "synced" in point:
    staging._sync = die
if "put" in point:
    staging._put = die
if "old removed" in point:
    staging.shutil.rmtree = die
if "between" in point:
    rename = Path.rename
    Path.rename = lambda self, to: rename(self, to) if "-old" in str(to) else die()
with staging.staging_folder(out, overwrite=True) as folder:
    (folder / "file").write_text("new")
    if point == "written":
        die()
"""


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
    monkeypatch.setattr(staging, "check_replaceable", lambda out, overwrite: None)
    with staging_folder(out, overwrite=True) as folder:
        assert (out / "file").read_text() == kept
        (folder / "file").write_text("newest")
    assert (out / "file").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_of_a_build_at_work_is_left_alone(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", overwrite=False) as first:
        with staging_folder(tmp_path / "out", overwrite=False):
            assert first.is_dir()
            (first / "file").write_text("still here")
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "still here"


def test_what_only_looks_like_a_left_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".out.partial-file").write_text("mine")
    with staging_folder(tmp_path / "out", overwrite=False):
        pass
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"elsewhere", ".out.partial-link", ".out.partial-file", "out"}


def test_everything_is_synced_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, put = os.fsync, staging._put

    def record_sync(descriptor: int) -> None:
        calls.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def record_put(folder: Path, out: Path) -> None:
        calls.append("put")
        put(folder, out)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(staging, "_put", record_put)
    with staging_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "weights").write_text("w")
        (folder / "manifest.json").write_text("m")
    assert set(calls[:2]) == {"sync weights", "sync manifest.json"}
    assert calls[2:] == [f"sync {folder.name}", "put", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("failing", ["fsync", "renameat2"])
def test_a_disk_that_fails_leaves_what_was_there(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(staging, "check_replaceable", lambda out, overwrite: None)
    (out / "file").write_text("old")

    def fail(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fail() if to == out else os.rename(self, to)
        )
    with pytest.raises(OSError, match="Input/output"), staging_folder(out, overwrite=True) as new:
        (new / "file").write_text("new")
    if failing == "renameat2":  # the disk takes no name back either: the next build does
        monkeypatch.undo()
        monkeypatch.setattr(staging, "check_replaceable", lambda out, overwrite: None)
        with pytest.raises(BundleError), staging_folder(out, overwrite=True):
            raise BundleError("no", hint="no")
    assert (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
