"""A few of the runs of `make kills`, and what they find where care is taken away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from kills import lose_power

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="loads a library first"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler"),
]


def kills(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `tests/kills.py` with few runs."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py")), "--out", str(out), *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )


def test_a_loss_of_power_takes_what_was_not_synced(tmp_path: Path) -> None:
    file, gone = tmp_path / "file", tmp_path / "gone" / "scratch"

    def lose(*log: tuple[str, Path]) -> str | None:
        file.write_text("whole")
        numbers = {tmp_path: tmp_path.stat().st_ino, file: file.stat().st_ino}
        numbers[gone] = numbers[file]  # of a file that is removed, and its number taken again
        calls = [[call, str(numbers[path]), "0", str(path)] for call, path in log]
        lose_power(tmp_path, calls, Random(1))
        return file.read_text() if file.exists() else None

    synced = ("write", file), ("fsync", file), ("fsync", tmp_path)
    assert lose(*synced) == "whole"
    assert lose(("write", gone), *synced) == "whole"
    assert lose(("write", gone), ("fsync", gone), ("write", file), ("fsync", tmp_path)) != "whole"
    assert lose(("write", file), ("fsync", file)) is None
    assert lose(*synced, ("write", file)) == "w"


def test_trouble_at_any_moment_leaves_nothing_half_written(tmp_path: Path) -> None:
    done = kills(tmp_path, "--killed", "3", "--full", "1", "--failing", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 runs, 0 things wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "finds"),
    [("staging", "not whole: "), ("sync", "not whole: "), ("cleaning", "leaves")],
)
def test_what_is_written_without_care_is_found(broken: str, finds: str, tmp_path: Path) -> None:
    options = ("--killed", "60", "--full", "0", "--failing", "0", "--break", broken)
    done = kills(tmp_path, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert finds in done.stdout
