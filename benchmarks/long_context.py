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
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from machine import describe
from make_checkpoint import write_checkpoint
from matplotlib.figure import Figure
from tqdm import tqdm

import pleexport
from pleexport import families
from pleexport.checkpoint import Checkpoint
from pleexport.families.base import CACHE_DTYPES
from pleexport.inspection import cache_bytes
from pleexport.process import memory

HERE = Path(__file__).parent
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


def plots(result: dict[str, Any]) -> list[str]:
    """Memory, with the computed size, and time of a decode step; SVG."""
    figures = []
    for quantity, label, factor in (
        ("grown_bytes", "memory above an empty context, MB", 1e-6),
        ("step_seconds", "time of a decode step, ms", 1e3),
    ):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for dtype, marks in result["measured"].items():
            positions = [m["positions"] for m in marks]
            (line,) = axes.plot(positions, [m[quantity] * factor for m in marks], "o-", label=dtype)
            if quantity == "grown_bytes":
                computed = [m["computed_bytes"] * factor for m in marks]
                axes.plot(positions, computed, ":", color=line.get_color())
        axes.set_xlabel("positions" + ("; dotted: computed" if factor < 1 else ""))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(title="cache")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        text = buffer.getvalue()
        figures.append(text[text.index("<svg") :])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", choices=SHAPE_NAMES, default=SHAPE_NAMES[0])
    parser.add_argument("--out", type=Path, help="build/benchmarks/long-context-SHAPE by default")
    parser.add_argument("--context", type=int, default=131_072, help="a power of two")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.threads)))
        return
    folder: Path = arguments.out or Path(f"build/benchmarks/long-context-{arguments.shape}")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").exists():
        write_checkpoint(arguments.shape, checkpoint)
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
            mark
            | {"computed_bytes": cache_bytes(model.with_cache(dtype), dtype, mark["positions"])}
            for mark in json.loads(done.stdout)
        ]
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=select_autoescape(["html"]))
    page = environment.get_template("long_context.html").render(result=result, plots=plots(result))
    (folder / "result.html").write_text(page, encoding="utf-8")
    for dtype, marks in result["measured"].items():
        for m in marks:
            print(
                f"{dtype} {m['positions']:>7,}: {m['grown_bytes'] / 1e6:8.1f} MB, computed "
                f"{m['computed_bytes'] / 1e6:8.1f} MB; step {m['step_seconds'] * 1e3:6.2f} ms; "
                f"prefill {m['prefill_tokens_per_second']:,.0f} tokens/s"
            )
    print(f"written: {folder / 'result.html'}")


if __name__ == "__main__":
    main()
