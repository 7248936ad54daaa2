"""A build is the same, byte for byte, wherever and whenever it runs. Its packages are locked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES
from packaging.requirements import Requirement

import pleexport
from pleexport.backends.onnx import lower

ROOT = Path(__file__).parents[1]
# A build as a user of another country runs it in the evening, who lets nobody read the files.
ELSEWHERE = """
import os, sys
os.umask(0o077)
from pleexport.cli import main
sys.argv = ["pleexport", "build", "deep/er/checkpoint", "--out", "deep/result", {options}]
main()
"""


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Translate each program anew, as builds outside of tests do."""
    monkeypatch.setattr(lower, "translate", lower.translate.__wrapped__)


def build_elsewhere(checkpoint: Path, folder: Path, *options: str) -> Path:
    """A bundle by another process, of a copy at another path, whose files were made in reverse."""
    copy = folder / "deep" / "er" / "checkpoint"
    for name in ("deep/er/checkpoint", "home", "scratch"):
        (folder / name).mkdir(parents=True)
    for path in sorted(checkpoint.iterdir(), reverse=True):
        shutil.copyfile(path, copy / path.name)
    surroundings = {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "scratch"),
        "LC_ALL": "C",
        "TZ": "Pacific/Kiritimati",
        "PYTHONHASHSEED": "77",
        "PYTHONUTF8": "0",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(pleexport.__file__).parents[1]),
    }
    code = ELSEWHERE.format(options=", ".join(map(repr, options)))
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | surroundings,
        check=True,
        capture_output=True,
    )
    return folder / "deep" / "result"


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


def check_same(checkpoint: Path, folder: Path, *options: str, **settings: Any) -> None:
    here = pleexport.build(checkpoint, folder / "here", **settings).path
    there = build_elsewhere(checkpoint, folder / "there", *options)
    assert contents(here) == contents(there)
    # Nothing says where they were built, so the environment may lie elsewhere as well.
    for places in (ROOT, sys.prefix, checkpoint.parent, folder):
        for name, content in contents(there).items():
            assert str(places).encode() not in content, name


def test_a_build_elsewhere_is_the_same_byte_for_byte(
    gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    check_same(
        gemma4_checkpoint,
        tmp_path,
        *("--target", "android", "--no-verify"),
        target="android",
        verify=False,
    )
    other = pleexport.build(gemma4_checkpoint, tmp_path / "other", verify=False)  # the control
    assert contents(other.path) != contents(tmp_path / "here")


@pytest.mark.slow
def test_a_sample_with_tokenizer_and_text_is_the_same_elsewhere(tmp_path: Path) -> None:
    text = SAMPLES / "heldout.txt"
    options = {"target": "laptop", "calibrate": str(text)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    check_same(SAMPLES / "gemma3n-kjv", tmp_path, *words, **options)


# requirements.lock.


def locked() -> dict[str, tuple[str, int]]:
    """By name, the version and the number of checksums of each package of the lock."""
    blocks = re.split(r"\n(?=\w)", (ROOT / "requirements.lock").read_text())
    found = {}
    for block in blocks:
        if pinned := re.match(r"([\w.-]+)==([^ ;\\]+)", block):
            found[pinned[1].lower()] = (pinned[2], block.count("--hash=sha256:"))
    return found


def test_the_lock_has_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    packages = locked()
    for line in (*project["dependencies"], *(line for extra in extras for line in extra)):
        wanted = Requirement(line)
        version, _ = packages[wanted.name.lower()]
        assert wanted.specifier.contains(version), line


def test_the_oldest_packages_are_those_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = [re.split("[><=]=|,", line)[:2] for line in project["dependencies"]]
    listed = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    assert listed[1:] == [f"{name}=={version}" for name, version in oldest]


def test_every_locked_package_has_checksums_and_no_address() -> None:
    assert len(locked()) > 100
    assert [name for name, (_, checksums) in locked().items() if not checksums] == []
    assert "://" not in (ROOT / "requirements.lock").read_text()
