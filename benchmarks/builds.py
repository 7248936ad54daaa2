"""Measure a build: peak memory and time, beside copying the same files.

    python benchmarks/builds.py gemma4-e2b

The checkpoint is made once. `cp` copies it and then the bundle's files, on the same disk and in the
same run; both copies are removed.
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

from machine import describe
from make_checkpoint import made_checkpoint
from page import Section, Table
from peer import resident_bytes
from shapes import SHAPES

from pleexport.backends.registry import NAMES

SAMPLING_SECONDS = 0.02


def build(checkpoint: Path, out: Path, target: str, backend: str) -> dict[str, Any]:
    """Build in a process of its own; seconds, and the largest memory seen, in bytes."""
    command = [sys.executable, "-m", "pleexport.cli", "build", checkpoint, "--target", target]
    command += ["--backend", backend]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--out", out, "--overwrite", "--no-verify"])
    peak = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for name, nbytes in resident_bytes(process.pid).items():
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


def measure(shape: str, folder: Path, target: str, backend: str) -> dict[str, Any]:
    """Build, copy, and remove both."""
    checkpoint, out = made_checkpoint(shape, folder), folder / "build-test"
    result = {"shape": shape, "target": target, "backend": backend}
    result |= {"machine": describe(folder, threads=2)} | build(checkpoint, out, target, backend)
    for name, source in (("copy_checkpoint_seconds", checkpoint), ("copy_bundle_seconds", out)):
        result[name] = copy_seconds(source, folder / "copy-test")
    shutil.rmtree(out)
    copies = result["copy_checkpoint_seconds"] + result["copy_bundle_seconds"]
    result["limit_seconds"] = 2 * copies + 60
    return result


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    rows = [
        ("build", f"{result['build_seconds']:.1f} s"),
        ("cp of the checkpoint", f"{result['copy_checkpoint_seconds']:.1f} s"),
        ("cp of the bundle", f"{result['copy_bundle_seconds']:.1f} s"),
        ("twice both, and 60 s", f"{result['limit_seconds']:.1f} s"),
        ("largest anonymous memory", f"{result['peak_bytes']['RssAnon'] / 1e9:.2f} GB"),
        ("largest file-backed memory", f"{result['peak_bytes']['RssFile'] / 1e9:.2f} GB"),
    ]
    text = f"For {result['target']} with {result['backend']}, without verifying."
    text += " File-backed memory can be taken back."
    return [Section(f"{result['shape']}: a build", text, [Table(("", ""), rows)])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, help="folder; build/benchmarks/SHAPE by default")
    parser.add_argument("--target", default="android")
    parser.add_argument("--backend", choices=NAMES, default="onnx")
    arguments = parser.parse_args()
    folder: Path = arguments.out or Path("build/benchmarks") / arguments.shape
    result = measure(arguments.shape, folder, arguments.target, arguments.backend)
    (folder / "builds.json").write_text(json.dumps(result, indent=2))
    for label, value in sections(result)[0].tables[0].rows:
        print(f"{label}: {value}")


if __name__ == "__main__":
    main()
