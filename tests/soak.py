"""Generate for hours in one process, and watch what it holds: `make soak MINUTES=60`.

Every text is one of a few dozen whose answer was written down when it was first given, and has to
be the same each time. Memory, open files, threads and maps are written down as time goes on, and
have to stay as they are once the runner is warm. A plot of them is drawn at the end.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pleexport
from pleexport.process import memory

ROOT = Path(__file__).parents[1]
# Allocators keep what they may need again, so memory settles in the first part of a run. What it
# may grow by in the rest is far below what a hundred lost texts or one lost cache would take.
SETTLED, MOST_GROWTH = 0.25, 2 << 20
PROMPTS = ("In the beginning", "And it came to pass", "Blessed are the", "The LORD said unto Moses")
WAYS: tuple[dict[str, Any], ...] = (
    {"greedy": True},
    {"greedy": True, "draft": "lookup", "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.95, "seed": 7},
    {"temperature": 1.2, "top_k": 30, "seed": 8, "repetition_penalty": 1.1, "draft": "lookup"},
    {"greedy": True, "stop": ["."]},
)


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment; memory in bytes."""

    minutes: float
    texts: int
    anonymous: int
    file_backed: int
    files: int
    threads: int
    maps: int

    @classmethod
    def now(cls, *, minutes: float = 0, texts: int = 0) -> Held:
        gc.collect()
        found, own = memory(), Path("/proc/self")
        return cls(
            minutes=round(minutes, 3),
            texts=texts,
            anonymous=found.anonymous or 0,
            file_backed=found.file_backed or 0,
            files=len(os.listdir(own / "fd")),
            threads=len(os.listdir(own / "task")),
            maps=len((own / "maps").read_text().splitlines()),
        )


def texts(runner: pleexport.Runner) -> Iterator[tuple[object, list[int]]]:
    """Texts one after the other, without end: what makes each one special, and its answer's ids."""
    for length, prompt, way in itertools.cycle(
        itertools.product((1, 20, 200), PROMPTS, range(len(WAYS)))
    ):
        tokens = runner.generate(prompt, max_new_tokens=length, **WAYS[way])
        yield (length, str(prompt), way), [token.id for token in tokens]
        runner.reset()


def soak(bundle: Path, *, seconds: float, every: float, packed: Path | None) -> list[Held]:
    """Generate for so long, with runners that come and go beside the one that stays.

    Raises:
        AssertionError: a text had another answer than before.
    """
    runner = pleexport.Runner(bundle, threads=1, packed_weights=packed)
    begin = time.monotonic()
    answers: dict[object, list[int]] = {}
    held: list[Held] = []
    for count, (text, answer) in enumerate(texts(runner), start=1):
        assert answers.setdefault(text, answer) == answer, text
        if count % 50 == 0:
            other = pleexport.Runner(bundle, threads=1, packed_weights=packed)
            assert next(texts(other)) == next(iter(answers.items()))
            del other
        past = time.monotonic() - begin
        if past >= every * (len(held) + 1) or past >= seconds:
            held.append(Held.now(minutes=past / 60, texts=count))
            print(asdict(held[-1]), flush=True)
        if past >= seconds:
            return held
    raise AssertionError("the texts do not end")


def growth(held: list[Held]) -> list[str]:
    """What grew once the run had settled, as clauses; empty where all is flat."""
    rest = held[int(len(held) * SETTLED) :]
    half = len(rest) // 2
    found = []
    for name in ("files", "threads", "maps"):
        first, last = (max(getattr(h, name) for h in part) for part in (rest[:half], rest[half:]))
        # The allocator's own maps come and go.
        if last > first + (20 if name == "maps" else 0):
            found.append(f"{name} grew from {first} to {last}")
    first, last = (
        sum(h.anonymous for h in part) / len(part) for part in (rest[:half], rest[half:])
    )
    if last - first > MOST_GROWTH:
        found.append(f"memory grew from {first / 1e6:.1f} to {last / 1e6:.1f} MB")
    return found


def plot(held: list[Held], path: Path) -> None:
    """Draw memory and what else is counted, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    minutes = [h.minutes for h in held]
    for name in ("anonymous", "file_backed"):
        above.plot(minutes, [getattr(h, name) / 1e6 for h in held], label=name.replace("_", "-"))
    for name in ("files", "threads", "maps"):
        below.plot(minutes, [getattr(h, name) for h in held], label=name)
    for axes, label in ((above, "resident memory, MB"), (below, "count")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()
    below.set_xlabel("minutes")
    above.set_title(f"{held[-1].texts:,} texts in one process")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--bundle", type=Path, help="by default, of samples/gemma4-kjv")
    parser.add_argument("--packed", action="store_true", help="with packed weights")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "soak")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bundle = given.bundle or given.out / "bundle"
    if not given.bundle:  # in another process, which torch stays in
        sample = str(ROOT / "samples" / "gemma4-kjv")
        command = [sys.executable, "-m", "pleexport", "build", sample, "--target", "android"]
        subprocess.run([*command, "--out", str(bundle), "--overwrite"], check=True)
    seconds = 60 * given.minutes
    packed = given.out / "packed" if given.packed else None
    held = soak(bundle, seconds=seconds, every=max(seconds / 500, 1), packed=packed)
    with (given.out / "soak.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Held)])
        writer.writeheader()
        writer.writerows(map(asdict, held))
    plot(held, given.out / "soak.png")
    found = growth(held)
    print(f"{held[-1].texts:,} texts in {held[-1].minutes:.0f} minutes, all as at first: ", end="")
    print("; ".join(found) or "flat")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
