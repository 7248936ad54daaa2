"""Time the Kotlin library against the Python runner, on one ONNX Runtime; tokens per second.

    mvn -q -f android-demo/runtime package -DskipTests
    python benchmarks/kotlin.py                 # six minutes; the bundle is made once

Both run the same bundle in turn, each in a process of its own, and with the same version of ONNX
Runtime. Half of the turns have threads that spin while they wait, and half have not; all is done
twice, on the machine as it is and beside one process that never rests. What counts is the ratio of
two neighbours. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_checkpoint import made_checkpoint
from shapes import SHAPES
from tqdm import tqdm

import pleexport

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "android-demo" / "runtime"
JAR = PROJECT / "target" / "pleexport-runtime.jar"
RUNNERS = ("python", "kotlin")
QUANTITIES = ("prefill", "decode")
PLACES = ("alone", "beside a busy process")
# By the medians, and as slow as this at most.
MOST_SLOWER = 0.05

Result = dict[str, float]


def version() -> str:
    """The ONNX Runtime that the library is built with."""
    found = re.search(r"<onnxruntime.version>(.+?)<", (PROJECT / "pom.xml").read_text())
    assert found is not None
    return found[1]


@functools.cache
def python_environment() -> dict[str, str]:
    """Where Python finds that version; it is fetched once."""
    folder = ROOT / "build" / f"onnxruntime-{version()}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        wanted = f"onnxruntime=={version()}"
        subprocess.run([*command, "--target", str(folder), wanted], check=True)
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    check = "import onnxruntime; print(onnxruntime.__version__)"
    if (found := output([sys.executable, "-c", check], environment).strip()) != version():
        raise SystemExit(f"error: Python has onnxruntime {found}, and the library {version()}")
    return environment


def turn(runner: str, bundle: Path, spin: bool, arguments: argparse.Namespace) -> Result:
    """Tokens per second of one process, after a run that warms up."""
    program = {
        "python": [sys.executable, "-m", "pleexport"],
        "kotlin": ["java", "-jar", str(JAR)],
    }[runner]
    command = [*program, "bench", str(bundle), "--json", "--no-verify"]
    command += ["--prompt-tokens", str(arguments.prompt_tokens)]
    command += ["--decode-tokens", str(arguments.decode_tokens), "--repeat", "3"]
    command += ["--threads", str(arguments.threads), "--spin" if spin else "--no-spin"]
    said = json.loads(output(command, python_environment() if runner == "python" else None))
    (timing,) = said["timings"]
    return {quantity: timing[f"{quantity}_tokens_per_second"] for quantity in QUANTITIES}


def output(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed\n{done.stderr}")
    return done.stdout


@contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """One more process that never rests, or none."""
    if not is_busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All turns: by place, by spinning, by runner, a list."""
    turns: dict[str, dict[str, dict[str, list[Result]]]] = {
        place: {name: {runner: [] for runner in RUNNERS} for name in ("spin", "no spin")}
        for place in PLACES
    }
    bar = tqdm(total=len(PLACES) * arguments.pairs * 4, unit=" turns")
    for place, pair in itertools.product(PLACES, range(arguments.pairs)):
        # Whoever is first meets another machine than who is second: they take turns in that too.
        order = [(name, runner) for name in ("spin", "no spin") for runner in RUNNERS]
        for name, runner in order[:: -1 if pair % 2 else 1]:
            with busy(place != PLACES[0]):
                found = turn(runner, bundle, name == "spin", arguments)
            turns[place][name][runner].append(found)
            bar.update()
    bar.close()
    return {
        "onnxruntime": version(),
        "threads": arguments.threads,
        "load": os.getloadavg()[2],
        "turns": turns,
    }


def compared(ones: list[Result], others: list[Result], quantity: str) -> list[float]:
    """How many times as fast the ones are as the others, by pairs; sorted."""
    return sorted(a[quantity] / b[quantity] for a, b in zip(ones, others, strict=True))


def summary(result: dict[str, Any]) -> Iterator[str]:
    """Lines for a person; ratios with their spread."""

    def ratio(what: str, values: list[float]) -> str:
        return f"  {what}: {statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    for place, turns in result["turns"].items():
        for name, quantity in itertools.product(turns, QUANTITIES):
            of = {r: statistics.median(t[quantity] for t in turns[name][r]) for r in RUNNERS}
            speeds = ", ".join(f"{runner} {speed:.1f}" for runner, speed in of.items())
            yield f"{place}, {name}, {quantity}: {speeds} tokens/s"
            ratios = compared(turns[name]["kotlin"], turns[name]["python"], quantity)
            slow = statistics.median(ratios) < 1 - MOST_SLOWER
            yield ratio("Kotlin to Python", ratios) + (", TOO SLOW" if slow else "")
        for runner, quantity in itertools.product(RUNNERS, QUANTITIES):
            ratios = compared(turns["no spin"][runner], turns["spin"][runner], quantity)
            yield ratio(f"{place}, {runner}, {quantity}, no spin to spin", ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="gemma4-small")
    parser.add_argument("--out", type=Path, help="folder; build/benchmarks/SHAPE by default")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one pair, few decode steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs, arguments.decode_tokens = 1, 8
    if not JAR.exists():
        raise SystemExit(f"error: `{JAR.relative_to(ROOT)}` is missing; build it as shown above")
    folder = arguments.out or Path("build/benchmarks") / arguments.shape
    bundle = folder / "android"
    if not bundle.exists():
        checkpoint = made_checkpoint(arguments.shape, folder)
        pleexport.build(checkpoint, bundle, target="android", verify=False)
    result = measure(bundle, arguments)
    (folder / "kotlin.json").write_text(json.dumps(result, indent=2))
    print(*summary(result), sep="\n")


if __name__ == "__main__":
    main()
