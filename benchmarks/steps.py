"""Time decode steps with rows from the blob and with constant ones, in turn; seconds.

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

CONTEXT = 128


def measure(bundle: Path, threads: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of each kind, every token in a new row."""
    runner = pleexport.Runner(bundle, threads=threads)
    ids = np.random.default_rng(3).integers(0, runner.blob.num_rows, CONTEXT + 2 * steps).tolist()
    runner.feed(ids[:CONTEXT])
    constant = runner.blob.lookup(ids[:1])
    seconds: dict[str, list[float]] = {"blob": [], "constant": []}
    for i, token in enumerate(ids[CONTEXT:]):
        kind = "constant" if i % 2 else "blob"
        started = time.perf_counter()
        runner.feed([token], constant if kind == "constant" else None)
        seconds[kind].append(time.perf_counter() - started)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=48, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.bundle, arguments.threads, arguments.steps)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"rows of the blob {result['blob'] * 1e3:.3f} ms a step, constant rows "
            f"{result['constant'] * 1e3:.3f} ms: {result['blob'] / result['constant'] - 1:+.2%}"
        )


if __name__ == "__main__":
    main()
