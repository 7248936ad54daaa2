"""Measure a build: peak memory and time, beside copying the same files.

    python benchmarks/build.py build/benchmarks/gemma4-e2b

The folder holds `checkpoint`, as `compare.py` or `make_checkpoint.py` make it. `cp` copies the
checkpoint and then the bundle's files, on the same disk in the same run; both copies are removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SAMPLING_SECONDS = 0.02


def build(checkpoint: Path, out: Path, target: str) -> dict[str, Any]:
    """Build in a process of its own; seconds, and the largest memory seen, in bytes."""
    command = [sys.executable, "-m", "pleexport.cli", "build", checkpoint, "--target", target]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--out", out, "--overwrite", "--no-verify"])
    peak = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for name, nbytes in _resident(process.pid).items():
            peak[name] = max(peak[name], nbytes)
        time.sleep(SAMPLING_SECONDS)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"build_seconds": time.perf_counter() - started, "peak_bytes": peak}


def copy_seconds(source: Path, copy: Path) -> float:
    """Time of `cp -r`, until the data is on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, copy], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(copy)
    return seconds


def _resident(pid: int) -> dict[str, int]:
    """Anonymous and file-backed memory of a process. Source: proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = {line.split(":")[0]: line.split() for line in lines}
    return {n: int(fields[n][1]) * 1024 for n in ("RssAnon", "RssFile") if n in fields}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="android")
    arguments = parser.parse_args()
    checkpoint, out = arguments.folder / "checkpoint", arguments.folder / "build-test"
    result = build(checkpoint, out, arguments.target)
    for name, source in (("copy_checkpoint_seconds", checkpoint), ("copy_bundle_seconds", out)):
        result[name] = copy_seconds(source, arguments.folder / "copy-test")
    shutil.rmtree(out)
    copies = result["copy_checkpoint_seconds"] + result["copy_bundle_seconds"]
    result["limit_seconds"] = 2 * copies + 60
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
