"""Time a bundle in Chromium beside transformers.js, on one checkpoint; JSON and an HTML page.

    cd web-demo/pleexport-web && npm ci --ignore-scripts && npm run build && cd ../..
    npm install --prefix build/benchmarks/npm --ignore-scripts @huggingface/transformers@4.3.2
    python benchmarks/browser.py                # ten minutes; inputs are made once
    python benchmarks/browser.py --quick

Each engine runs in a browser of its own, one after the other. The checkpoint has random weights:
its prompts are random ids, and so is what it says, and each token needs a row of its own. What a
real text needs is counted on a trained sample. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe
from make_checkpoint import made_checkpoint
from page import Section, Table, machine_section, write_page
from shapes import SHAPES
from tqdm import tqdm
from write_transformersjs import DTYPES

import pleexport

HERE = Path(__file__).parent
ROOT = HERE.parent
SHAPE = "gemma4-small"
CONTEXTS = (8192, 131_072)
PROMPT_TOKENS = 100
SAMPLE, TEXT = ROOT / "samples" / "gemma4-kjv", ROOT / "samples" / "heldout.txt"
SAMPLE_PROMPT = "In the beginning"
TRANSFORMERS_JS = Path("build/benchmarks/npm/node_modules/@huggingface/transformers")
OURS, SAID = "pleexport", "pleexport, the trained sample"
STEPS = "pleexport, by context"
# Beside weights and caches: code, the page, buffers.
MEMORY_GOAL = 300_000_000


def make_package(checkpoint: Path, folder: Path, **options: Any) -> Path:
    """A package for the web, with what a held-out text uses most; one that is there is kept."""
    bundle, package = folder / "web", folder / "web-package"
    if not bundle.exists():
        pleexport.build(checkpoint, bundle, target="web", verify=False, **options)
    if not package.exists():
        pleexport.package(bundle, package, target="web", texts=[TEXT])
    return package


def make_peer(checkpoint: Path, folder: Path, *, rows: Path) -> Path | None:
    """The folder that transformers.js reads, with a bundle's rows; None without it."""
    if not TRANSFORMERS_JS.exists():
        tqdm.write(f"left out: transformers.js, for which there is no {TRANSFORMERS_JS}")
        return None
    peer = folder / "transformersjs"
    for dtype, (suffix, _) in DTYPES.items():
        if not (peer / "onnx" / f"decoder_model_merged{suffix}.onnx").exists():
            script = [sys.executable, HERE / "write_transformersjs.py", checkpoint, peer]
            subprocess.run([*script, "--dtype", dtype, "--rows", rows], check=True)
    return peer


def run(engine: str, model: Path, arguments: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """One engine in one browser; see browser/run.mjs."""
    wanted = {
        "engine": engine,
        "model": model.absolute().relative_to(ROOT).as_posix(),
        "vocab": SHAPES[SHAPE]["text_config"]["vocab_size"],
        "promptTokens": PROMPT_TOKENS,
        "decodeTokens": arguments.decode_tokens,
        "repeat": arguments.repeat,
        "threads": 1,
        "moreTokens": 99,
    } | options
    command = ["node", str(HERE / "browser" / "run.mjs"), json.dumps(wanted)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {engine} failed in the browser\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def several(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s' * (threads != 1)}"


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the inputs, run all engines, and collect what they say."""
    checkpoint = made_checkpoint(SHAPE, folder)
    small, package = (
        make_package(checkpoint, folder / f"web-{n}", context=n, tokenizer=SAMPLE) for n in CONTEXTS
    )
    sample = make_package(SAMPLE, folder / "sample")
    peer = make_peer(checkpoint, folder, rows=package)
    threads = (1,) if arguments.quick else (1, 2)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        f"{OURS}, {several(n)}": partial(run, OURS, package, arguments, threads=n) for n in threads
    }
    if peer:
        for dtype in DTYPES:
            # All that it loads is here before the first token.
            options = {"dtype": dtype, "moreTokens": 3, "decodeTokens": 9}
            runs |= {
                f"transformers.js {dtype}, {several(n)}": partial(
                    run, "transformersjs", peer, arguments, threads=n, **options
                )
                for n in threads
            }
    ids = pleexport.Runner(sample).tokenizer.encode(SAMPLE_PROMPT)
    runs[SAID] = partial(run, OURS, sample, arguments, ids=ids, repeat=0)
    models = [own.relative_to(ROOT).as_posix() for own in (small.absolute(), package.absolute())]
    # Short texts in turn, so that nobody has the quiet moments.
    turns = {"decodeTokens": 9, "repeat": 4 * arguments.repeat}
    runs[STEPS] = partial(run, OURS, package, arguments, models=models, **turns)
    engines = {name: engine() for name, engine in tqdm(runs.items(), unit=" browsers")}
    files = pleexport.Bundle(package).decoder.files
    return {
        "machine": describe(folder, 1),
        "dense_bytes": sum((package / name).stat().st_size for name in files),
        "engines": engines,
    }


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    steps = result["engines"][STEPS]["stepSeconds"]
    counted = {name: own for name, own in result["engines"].items() if name != STEPS}
    engines = {name: own for name, own in counted.items() if own["runs"]}
    speed = [[name, *_speeds(own)] for name, own in engines.items()]
    traffic = [[name, *_traffic(own)] for name, own in counted.items()]
    rows = [
        [f"{n:,} tokens", f"{seconds * 1e3:.1f} ms", f"x {seconds / steps[0]:.2f}"]
        for n, seconds in zip(CONTEXTS, steps, strict=True)
    ]
    limit = result["dense_bytes"] + MEMORY_GOAL
    version = next(iter(engines.values()))["browser"]
    return [
        Section(
            f"In Chromium {version}, on WebAssembly: speed and memory",
            f"{SHAPE}, random weights. Prefill of {PROMPT_TOKENS} tokens, decoding behind them: "
            "medians, and below them the least and the largest. In brackets, tokens a second of "
            "processor time, of all threads. Memory is the peak of the page's process, with code; "
            f"dense weights and {MEMORY_GOAL / 1e6:.0f} MB are {limit / 1e6:.0f} MB.",
            [Table(["", "load", "prefill", "decode", "peak memory"], speed)],
        ),
        Section(
            "In Chromium: what a text needs of the server",
            "Of the model, without the runtime. A text goes on greedily from 16 random ids, where "
            f'each token needs its own row, and from "{SAMPLE_PROMPT}" in the trained sample. '
            "transformers.js has the whole table before the first token, and was asked for four.",
            [Table(["", "to the first token", "to the hundredth"], traffic)],
        ),
        Section(
            "In Chromium: a step of a bundle for long texts",
            "By the context of the bundle, the best of some texts of 64 tokens in turn, 1 thread. "
            "Caches have slots for the text and not for the context, up to twice as many.",
            [Table(["context", "a step", ""], rows)],
        ),
    ]


def _speeds(engine: dict[str, Any]) -> list[str]:
    def cell(counts: list[int], seconds: list[float], processor: list[float]) -> str:
        speeds = sorted(n / s for n, s in zip(counts, seconds, strict=True))
        busy = [n / s for n, s in zip(counts, processor, strict=True) if s > 0]
        ours = f" ({statistics.median(busy):.1f})" if busy else ""
        spread = f"{speeds[0]:.1f} to {speeds[-1]:.1f}"
        return f"{statistics.median(speeds):.1f} tokens/s\n{spread}{ours}"

    runs = engine["runs"]
    prefills = [run["prefill"] for run in runs]
    decodes = [run["decode"] for run in runs]
    # A run that decodes reads the prompt as well.
    both = zip(decodes, prefills, strict=True)
    return [
        f"{engine['loadSeconds']:.1f} s",
        cell(
            [PROMPT_TOKENS] * len(runs),
            [own["prefillSeconds"] for own in prefills],
            [own["processorSeconds"] for own in prefills],
        ),
        cell(
            [len(own["ids"]) - 1 for own in decodes],
            [own["decodeSeconds"] for own in decodes],
            [own["processorSeconds"] - prefill["processorSeconds"] for own, prefill in both],
        ),
        f"{engine['peakBytes'] / 1e6:,.0f} MB",
    ]


def _traffic(engine: dict[str, Any]) -> list[str]:
    return [
        f"{own['bytes'] / 1e6:,.2f} MB\n{own['requests']} requests"
        for own in (engine["first"], engine["afterMore"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks") / SHAPE)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=33)
    parser.add_argument("--quick", action="store_true", help="one thread, one repetition")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeat = 1
    result = measure(arguments.out, arguments)
    (arguments.out / "browser.json").write_text(json.dumps(result, indent=2))
    page = arguments.out / "browser.html"
    found = sections(result)
    write_page(page, "In the browser", [*found, machine_section(result["machine"])])
    for section in found:
        for row in section.tables[0].rows:
            print("; ".join(row).replace("\n", ", "))
    print(f"written: {page}")


if __name__ == "__main__":
    main()
