"""The wheel works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_finds_its_targets_and_runs_bundles(gemma4_bundle: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import pleexport, pleexport.targets as t; print(pleexport.__file__); print(t.names()); "
        f"print(pleexport.Runner({str(gemma4_bundle)!r}).logits([1, 2]).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    place, names, shape = result.stdout.splitlines()
    assert Path(place).is_relative_to(installed)
    assert names == "['android', 'ios', 'laptop', 'raspberry-pi', 'web', 'web-gpu']"
    assert shape == "(2, 120)"
    for file in ("show/report.html", "parity/parity_text.txt"):
        assert (installed / "pleexport" / file).is_file()
