"""Memory and time per token in long texts; JSON and an HTML page with plots.

    python benchmarks/long_context.py                 # 15 minutes, most of it reading the prompts
    python benchmarks/long_context.py --context 16384
    python benchmarks/long_context.py embformer --context 4096

The first model has Gemma 4 E2B's layers, 35 of which 7 see the whole context and 3 of these hold
keys and values, but is narrow: its caches are what there is to measure. Embformer can do without a
cache, which is measured too ("none"). Each cache dtype runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from make_checkpoint import made_checkpoint
from matplotlib.figure import Figure
from page import Section, Table, machine_section, svg, write_page
from tqdm import tqdm

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.dtypes import CACHE_DTYPES
from pleexport.export.plan import cache_bytes
from pleexport.process import memory

SHAPE_NAMES = ("gemma4-narrow", "embformer")
FIRST_MARK = 1024
STEPS = 32


def measure(bundle: Path, threads: int) -> list[dict[str, float]]:
    """At each power of two positions: memory above an empty context, and time of a step."""
    runner = pleexport.Runner(bundle, threads=threads)
    ids = np.random.default_rng(0).integers(0, runner.blob.num_rows, runner.context).tolist()
    runner.feed(ids[: runner.chunk])  # now the runtime has its own buffers
    runner.reset()
    empty, position, mark, results = memory().anonymous or 0, 0, FIRST_MARK, []
    while mark <= runner.context:
        started, begin = time.perf_counter(), position
        while position < mark - STEPS:
            count = min(runner.chunk, mark - STEPS - position)
            runner.feed(ids[position : position + count])
            position += count
        prefill = time.perf_counter() - started
        steps = []
        for token in ids[position:mark]:
            started = time.perf_counter()
            runner.feed([token])
            steps.append(time.perf_counter() - started)
        results.append(
            {
                "positions": mark,
                "grown_bytes": (memory().anonymous or 0) - empty,
                "step_seconds": statistics.median(steps),
                "prefill_tokens_per_second": (position - begin) / prefill,
            }
        )
        position, mark = mark, 2 * mark
    return results


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    tables = []
    for dtype, marks in result["measured"].items():
        header = [f"{dtype} cache", "memory", "computed", "ratio", "step", "prefill up to here"]
        tables.append(Table(header, [_cells(mark) for mark in marks]))
    return [
        Section(
            f"{result['shape']}: up to {result['context']:,} positions",
            f"Random weights, {result['threads']} threads. Memory is what the process has in "
            "anonymous pages beyond an empty context; computed is the size of keys and values. A "
            "step is the median of the last decode steps before that position.",
            tables,
            [
                _plot(result, "grown_bytes", "memory above an empty context, MB", 1e-6),
                _plot(result, "step_seconds", "time of a decode step, ms", 1e3),
            ],
        )
    ]


def _cells(mark: dict[str, float]) -> list[str]:
    grown, computed = mark["grown_bytes"], mark["computed_bytes"]
    return [
        f"{mark['positions']:,}",
        f"{grown / 1e6:.1f} MB",
        f"{computed / 1e6:.1f} MB",
        f"{grown / computed:.3f}" if computed else "",
        f"{mark['step_seconds'] * 1e3:.2f} ms",
        f"{mark['prefill_tokens_per_second']:,.0f} tokens/s",
    ]


def _plot(result: dict[str, Any], quantity: str, label: str, factor: float) -> str:
    """A quantity over positions, with the computed size where there is one; SVG."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes, with_computed = figure.subplots(), quantity == "grown_bytes"
    for dtype, marks in result["measured"].items():
        positions = [m["positions"] for m in marks]
        (line,) = axes.plot(positions, [m[quantity] * factor for m in marks], "o-", label=dtype)
        if with_computed:
            computed = [m["computed_bytes"] * factor for m in marks]
            axes.plot(positions, computed, ":", color=line.get_color())
    axes.set_xlabel("positions" + ("; dotted: computed" if with_computed else ""))
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(title="cache")
    return svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", choices=SHAPE_NAMES, default=SHAPE_NAMES[0])
    parser.add_argument("--out", type=Path, help="build/benchmarks/long-context-SHAPE by default")
    parser.add_argument("--context", type=int, default=131_072, help="a power of two")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4,096 positions")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.threads)))
        return
    if arguments.quick:
        arguments.context = 4096
    folder: Path = arguments.out or Path(f"build/benchmarks/long-context-{arguments.shape}")
    checkpoint = made_checkpoint(arguments.shape, folder)
    source = Checkpoint(checkpoint)
    model = families.resolve(source)
    result: dict[str, Any] = {
        "shape": arguments.shape,
        "context": arguments.context,
        "threads": arguments.threads,
        "machine": describe(folder, arguments.threads),
        "measured": {},
    }
    dtypes = [dtype for dtype in CACHE_DTYPES if dtype != "none" or model.without_cache]
    for dtype in tqdm(dtypes, unit=" dtypes"):
        bundle = pleexport.build(
            checkpoint,
            folder / dtype,
            target="laptop",
            cache_dtype=dtype,
            context=arguments.context,
            overwrite=True,
            verify=False,
        )
        command = [sys.executable, __file__, "--measure", bundle.path]
        done = subprocess.run(
            [*command, "--threads", str(arguments.threads)], check=True, stdout=subprocess.PIPE
        )
        result["measured"][dtype] = [
            mark | {"computed_bytes": cache_bytes(model.with_cache(dtype), mark["positions"])}
            for mark in json.loads(done.stdout)
        ]
    (folder / "long_context.json").write_text(json.dumps(result, indent=2))
    page = folder / "long_context.html"
    write_page(page, "Long contexts", [*sections(result), machine_section(result["machine"])])
    for dtype, marks in result["measured"].items():
        for m in marks:
            print(
                f"{dtype} {m['positions']:>7,}: {m['grown_bytes'] / 1e6:8.1f} MB, computed "
                f"{m['computed_bytes'] / 1e6:8.1f} MB; step {m['step_seconds'] * 1e3:6.2f} ms; "
                f"prefill {m['prefill_tokens_per_second']:,.0f} tokens/s"
            )
    print(f"written: {page}")


if __name__ == "__main__":
    main()
