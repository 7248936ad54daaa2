"""`python -m tests.fuzz`: try mutated inputs for some minutes, or those of given seeds."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pleexport.runtime.template_limit import within_limits

from .bases import make_bases, open_bases
from .cases import corpus_seeds, make_case, write_case
from .ledger import Ledger, default_folder
from .pool import HANG_SECONDS, Pool

_EVERY_SECONDS = 15.0
_TEMPLATE_SECONDS = 0.5
_OF_BUNDLES = (
    "pleexport.cli",
    "pleexport.runtime.runner",
    "pleexport.show.stats",
    "pleexport.targets",
    "pleexport.backends.onnx.session",
)
_OF_CHECKPOINTS = (
    "pleexport.backends.executorch.session",
    "pleexport.backends.onnx.lower",
    "pleexport.export.packaging",
    "pleexport.export.builder",
    "pleexport.export.calibration",
    "pleexport.families.trace",
    "pleexport.inspection.inspect",
    "pleexport.show.inspection",
)


def main() -> int:
    """Run; the exit code is 1 where something was found."""
    options = _parse()
    work = Path(options.work or tempfile.mkdtemp(prefix="pleexport-fuzz-", dir=_in_memory()))
    work = work.resolve()
    all_bases = Path(options.bases).resolve() if options.bases else work / "bases"
    for problem in in_a_process(lambda: make_bases(all_bases, torch=not options.no_torch)):
        print(problem, file=sys.stderr)
    if options.only_bases:
        return 0
    bases = open_bases(all_bases)
    if options.keep:
        for seed in _seeds(options, 1):
            case = make_case(seed, bases)
            if case:
                place = Path(options.keep) / str(seed)
                place.mkdir(parents=True)
                write_case(case, bases[case.base], place)
                print(place, case.operation, *case.edits, sep="\n  ")
        return 0
    load(torch=not options.no_torch)
    ledger = Ledger(Path(options.state) if options.state else default_folder())
    pool = Pool(bases, all_bases, work, jobs=options.jobs, seconds=options.seconds)
    until = time.monotonic() + 60 * options.minutes
    _run(pool, ledger, _seeds(options, ledger.next_seed), until, options.verbose)
    return 1 if ledger.here["findings"] else 0


def _run(pool: Pool, ledger: Ledger, seeds: Iterator[int], until: float, verbose: bool) -> None:
    started = last = time.monotonic()
    try:
        for result in pool.run(seeds, until=until):
            is_new = ledger.add(result)
            if verbose:
                print(json.dumps(result), flush=True)
            if is_new:
                print(_described(result), flush=True)
            now = time.monotonic()
            if now - last > _EVERY_SECONDS:
                _say(ledger, now - started)
                ledger.save(now - last)
                last = now
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        ledger.save(time.monotonic() - last)
        _say(ledger, time.monotonic() - started)
        for own, count in ledger.signatures.most_common():
            print(f"  {count} x {own}")
        print(ledger.summary())


def _described(result: dict[str, object]) -> str:
    edits = result.get("edits")
    lines = [
        f"FINDING seed {result['seed']}: {result['problem']}",
        f"  {result.get('base')}, {result.get('operation')}, sealed: {result.get('sealed')}",
        f"  {edits}",
        f"  replay: python -m tests.fuzz --seeds {result['seed']}",
    ]
    return "\n".join(lines)


def _say(ledger: Ledger, seconds: float) -> None:
    here = ledger.here
    print(
        f"{here['inputs']:,} inputs, {here['inputs'] / max(seconds, 1e-9):.1f} a second, "
        f"{here['findings']} findings of {len(ledger.signatures)} kinds, "
        f"{here['skipped']} skipped; {ledger.inputs:,} in all",
        flush=True,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--seed", type=int, help="the first; by default the corpus, then the first untried one"
    )
    parser.add_argument("--seeds", help="A:B tries seeds from A to before B; A,C tries these")
    parser.add_argument("--state", help="folder of the totals and the findings")
    parser.add_argument("--bases", help="folder of the bases, made where they are not there")
    parser.add_argument("--work", help="folder of the sandboxes; by default in memory")
    parser.add_argument("--seconds", type=float, default=HANG_SECONDS, help="what is a hang")
    parser.add_argument("--no-torch", action="store_true", help="make no base that needs torch")
    parser.add_argument("--only-bases", action="store_true", help="make the bases, and end")
    parser.add_argument("--keep", metavar="DIR", help="write the inputs of the seeds, try none")
    parser.add_argument("--verbose", action="store_true", help="print every result")
    return parser.parse_args()


def _in_memory() -> str | None:
    """The folder of Linux whose files are on no disk, since an input is written and synced."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _seeds(options: argparse.Namespace, first: int) -> Iterator[int]:
    if options.seeds and ":" in options.seeds:
        begin, end = options.seeds.split(":")
        return iter(range(int(begin), int(end)))
    if options.seeds:
        return iter([int(part) for part in options.seeds.split(",")])
    if options.seed is not None:
        return itertools.count(options.seed)
    return itertools.chain(corpus_seeds(), itertools.count(first))


def in_a_process(make: object) -> list[str]:
    """What a function returns, called in a forked process: no thread of it is left here."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            found = make()  # type: ignore[operator]
        except BaseException as err:
            found = [f"no bases: {err!r}"]
        os.write(write, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        found = json.loads(file.read() or "[]")
    os.waitpid(process, 0)
    return list(found)


def load(*, torch: bool) -> None:
    """Import once what all workers need."""
    for name in _OF_BUNDLES:
        importlib.import_module(name)
    try:
        for name in _OF_CHECKPOINTS if torch else ():
            importlib.import_module(name)
        if torch:
            importlib.import_module("torch").set_num_threads(1)
    except ImportError as err:
        print(f"torch is left out: {err}", file=sys.stderr)
    _hasten()
    gc.freeze()  # nothing of it is ever collected, so nobody looks at it again
    if threading.active_count() > 1:
        print(f"threads before a fork: {threading.enumerate()}", file=sys.stderr)


def _hasten() -> None:
    """Leave out what takes time and checks nothing."""
    typer = importlib.import_module("typer.main")
    # To put the command line together takes longer than most commands.
    typer.get_command = functools.cache(typer.get_command)  # type: ignore[attr-defined]
    chat = importlib.import_module("pleexport.runtime.chat")
    # A template that never ends is stopped, whenever that is.
    chat.within_limits = functools.partial(within_limits, seconds=_TEMPLATE_SECONDS)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
