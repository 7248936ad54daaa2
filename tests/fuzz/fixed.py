"""The part of the fuzzing that always runs: fixed seeds, and faults that must be found.

`python -m tests.fuzz.fixed FOLDER` prints one JSON object, as everything that is caught here, from
streams to crashes, is that of a process of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from pleexport import targets
from pleexport.errors import PleexportError

from .__main__ import in_a_process, load
from .bases import make_bases, open_bases
from .cases import Case, corpus_seeds
from .pool import Pool
from .worker import Worker

# What takes little time to make.
BASES = ["targets", "tokenizer", "world", "gemma4", "gemma4-text", "embformer", "rwkv"]
BASES += ["gemma4-shards", "adapter", "gemma4-bundle"]
SEEDS = 250


class _Planted(Worker):
    """A worker with one input, whatever the seed, and a fault."""

    def __init__(self, fault: str, folder: Path, *args: Any) -> None:
        super().__init__(folder, *args)
        self._fault = fault

    def try_seed(self, seed: int) -> dict[str, Any]:
        name, operation, file = "targets", "target", "laptop.toml"
        if self._fault in _OF_BUNDLES:
            name, operation, file = "gemma4-bundle", "run", "checksums.json"
        # As good as it was: a text of either kind may end with a space.
        changed: dict[str, bytes | None] = {file: self._bases[name].content[file] + b" "}
        with _FAULTS[self._fault]():
            return self.try_case(Case(seed, name, operation, False, [], changed, {}))


def _loading(does: Callable[[], object]) -> AbstractContextManager[Any]:
    """Let the reading of a target do something else too."""
    load_target = targets.load

    def loads(name: str) -> targets.Target:
        does()
        return load_target(name)

    return mock.patch.object(targets, "load", loads)


def _key_error() -> None:
    raise KeyError("missing")


def _log() -> None:
    os.write(2, b"\x1b[1;31m2026 [E:onnxruntime:Default, a.cc:1 f()] overflow\n nmemb=5\x1b[m\n")


def _log_and_refuse() -> None:
    _log()
    raise PleexportError("refused", hint="mend it")


def _spin() -> None:
    while True:
        pass


_calls = itertools.count()


def _take_memory() -> None:
    """Every other time, as what an honest input takes is asked in between."""
    if next(_calls) % 2 == 0:
        len(b"x" * (300 << 20))


@contextmanager
def _other_logits() -> Iterator[None]:
    """Wrong by a little, and never the same twice."""
    from pleexport import Runner

    right, chances = Runner.logits, Random()

    def wrong(runner: Runner, ids: list[int]) -> Any:
        return right(runner, ids) + chances.random()

    with mock.patch.object(Runner, "logits", wrong):
        yield


_FAULTS: dict[str, Any] = {
    "a key error": lambda: _loading(_key_error),
    "a hang": lambda: _loading(_spin),
    "a crash": lambda: _loading(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "litter": lambda: _loading(lambda: Path("left.txt").touch()),
    "a write elsewhere": lambda: _loading(lambda: Path("../../elsewhere.txt").touch()),
    "output": lambda: _loading(lambda: os.write(2, b"EP Error")),
    "a log of what is taken": lambda: _loading(_log),
    "a log of what is refused": lambda: _loading(_log_and_refuse),
    "memory": lambda: _loading(_take_memory),
    "other logits": _other_logits,
    "no fault": nullcontext,
    "no fault in a bundle": nullcontext,
}
_OF_BUNDLES = {"other logits", "no fault in a bundle"}


def main() -> None:
    """Print what came of the fixed seeds, and what was found of each fault."""
    work = Path(sys.argv[1])
    all_bases = work / "bases"
    problems = in_a_process(lambda: make_bases(all_bases, only=BASES))
    load(torch=True)
    bases = open_bases(all_bases)
    seeds = [*corpus_seeds(), *range(SEEDS)]
    results = [*Pool(bases, all_bases, work, jobs=2).run(iter(seeds))]
    found = {}
    for fault in _FAULTS:

        def planted(folder: Path, fault: str = fault) -> Worker:
            return _Planted(fault, folder, bases, all_bases)

        pool = Pool(bases, all_bases, work, seconds=2.0, make=planted)
        found[fault] = [result.get("problem") for result in pool.run(iter([1]))]
    print(json.dumps({"problems": problems, "results": results, "found": found}))


if __name__ == "__main__":
    main()
