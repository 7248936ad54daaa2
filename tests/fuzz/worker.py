"""The process that tries inputs one after the other, and tells what became of each."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .bases import Base
from .cases import Case, make_case, write_case
from .exercise import exercise
from .judge import SLACK_BYTES, Tried, judge, needs_comparison
from .sandbox import Sandbox

# More than any input may ask for at once; less than would hurt the machine.
_ADDRESS_BYTES = 3 << 30


class Worker:
    """Tries inputs in a sandbox.

    Args:
        folder: of its sandbox.
        bases: by name, of the folder `all_bases`.
    """

    def __init__(self, folder: Path, bases: Mapping[str, Base], all_bases: Path) -> None:
        self._bases = bases
        self._sandbox = Sandbox(folder, all_bases)
        self._honest: dict[tuple[str, str], Tried] = {}

    def try_seed(self, seed: int) -> dict[str, Any] | None:
        """What became of the input of a seed; None where its base is missing."""
        case = make_case(seed, self._bases)
        return None if case is None else self.try_case(case)

    def try_case(self, case: Case) -> dict[str, Any]:
        """What became of an input, as data."""
        started = time.perf_counter()
        tried, honest = self._try(case), None
        if needs_comparison(case, tried):
            honest = self._honest_result(case)
            if tried.grown > SLACK_BYTES:
                tried = self._try(case)  # again, as what it loaded first is no fault of the input
        outcome, problem = judge(case, tried, honest)
        return {
            "seed": case.seed,
            "base": case.base,
            "operation": case.operation,
            "sealed": case.sealed,
            "edits": case.edits,
            "outcome": outcome,
            "problem": problem,
            "said": _said(tried),
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _honest_result(self, case: Case) -> Tried:
        """What an operation does with an unchanged base."""
        key = case.base, case.operation
        if key not in self._honest:
            unchanged = Case(case.seed, case.base, case.operation, False, [], {}, {})
            self._honest[key] = tried = self._try(unchanged)
            if tried.raised is not None:
                raise RuntimeError(f"{key} fails without a change") from tried.raised
        return self._honest[key]

    def _try(self, case: Case) -> Tried:
        base, sandbox = self._bases[case.base], self._sandbox
        sandbox.clear()
        write_case(case, base, sandbox.case)
        inside = base.inside
        if base.kind == "targets":
            inside = next((n for n in case.changed if n.endswith(".toml")), "")
        tried = Tried()
        before = _start_of_peak()
        sandbox.begin()
        try:
            tried.value = exercise(
                case.operation, base.kind, sandbox.case, inside, case.seed, sandbox.folder
            )
        except KeyboardInterrupt:
            raise
        except BaseException as err:
            tried.raised = err
        tried.grown = _peak() - before
        tried.out_exists = (sandbox.folder / "out").exists()
        tried.stdout, tried.stderr = sandbox.said()
        tried.wrote = sandbox.end()
        return tried


def serve(worker: Worker, seeds: Iterable[int], pipe: int, *, until: float) -> None:
    """Try seeds, and write a line of JSON before and after each.

    Args:
        until: a time of the monotonic clock, from which on no seed is begun.
    """
    # What Python shows by itself, and shows it each time.
    for kind in (UserWarning, RuntimeWarning, ResourceWarning, SyntaxWarning, FutureWarning):
        warnings.simplefilter("always", kind)
    limit_memory()
    for seed in seeds:
        if time.monotonic() > until:
            return
        _tell(pipe, {"begun": seed})
        _tell(pipe, {"done": seed, "result": worker.try_seed(seed)})


def limit_memory() -> None:
    """Let a request for memory that no input justifies fail."""
    now = _status()["VmSize"] + _ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (now, now))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tell(pipe: int, message: dict[str, Any]) -> None:
    data = (json.dumps(message) + "\n").encode("ascii")
    while data:
        data = data[os.write(pipe, data) :]


def _said(tried: Tried) -> str:
    if tried.raised is None:
        return ""
    text = getattr(tried.raised, "message", None) or str(tried.raised)
    return f"{text}\n{tried.stderr}"[:600].encode("ascii", "backslashreplace").decode()


def _start_of_peak() -> int:
    """Resident bytes now; the peak begins anew. Source: proc(5), clear_refs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status()["VmRSS"]


def _peak() -> int:
    return _status()["VmHWM"]


def _status() -> dict[str, int]:
    """Sizes of this process in bytes."""
    if not sys.platform.startswith("linux"):
        return {"VmSize": 1 << 40, "VmRSS": 0, "VmHWM": 0}
    found = {}
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(("VmSize", "VmRSS", "VmHWM")):
                name, size, *_ = line.split()
                found[name.removesuffix(":")] = int(size) << 10
    return found
