"""Time decode steps with warm, cold and constant rows, in turn; seconds.

python benchmarks/steps.py build/benchmarks/gemma4-e2b/android
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

import pleexport
from pleexport.errors import PleexportError

CONTEXT = 128


def measure(bundle: Path, threads: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of each kind: rows in the page cache, on the disk, or given."""
    runner = pleexport.Runner(bundle, threads=threads)
    generator = np.random.default_rng(3)
    runner.feed(generator.integers(0, runner.blob.num_rows, CONTEXT).tolist())
    constant = runner.blob.lookup(runner.blob.row_ids([0]))
    seconds: dict[str, list[float]] = {"warm": [], "cold": [], "constant": []}
    for _ in range(steps):
        for kind, times in seconds.items():
            token = int(generator.integers(0, runner.blob.num_rows))
            if kind == "cold":
                runner.blob.forget_pages()
            else:
                runner.blob.lookup(runner.blob.row_ids([token]))
            started = time.perf_counter()
            runner.feed([token], constant if kind == "constant" else None)
            times.append(time.perf_counter() - started)
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=48, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.bundle, arguments.threads, arguments.steps)
    except PleexportError as err:
        raise SystemExit(f"error: {err.message}") from None
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"constant rows {result['constant'] * 1e3:.3f} ms a step, "
            f"warm {result['warm'] / result['constant'] - 1:+.2%}, "
            f"cold {result['cold'] / result['constant'] - 1:+.2%}"
        )


if __name__ == "__main__":
    main()
