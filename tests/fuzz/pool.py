"""Workers side by side, watched: a crash or a hang is the finding of the input at work."""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bases import Base
from .cases import base_and_operation
from .worker import Worker, serve

# Of the processor, and of the clock where the processor waits.
HANG_SECONDS = 10.0
_STUCK_SECONDS = 600.0
# A build traces a model, which takes a second or two of an honest one.
_BUILD_SECONDS = 60.0
# Inputs of a process, which works out what they have in common.
_BATCH = 10_000


@dataclass
class _Running:
    """A worker and its input."""

    process: int
    pipe: int
    seeds: list[int]
    buffer: bytes = b""
    seed: int | None = None
    since: float = 0.0
    used: float = 0.0
    done: set[int] = field(default_factory=set)
    killed: str | None = None


class Pool:
    """Tries seeds in forked workers.

    Args:
        jobs: how many at once.
        folder: holds their sandboxes.
        seconds: of the processor that an input may take.
        make: makes a worker in a forked process; replaced where a fault is planted.
    """

    def __init__(
        self,
        bases: Mapping[str, Base],
        all_bases: Path,
        folder: Path,
        *,
        jobs: int = 1,
        seconds: float = HANG_SECONDS,
        make: Callable[[Path], Worker] | None = None,
    ) -> None:
        self._make = make or (lambda place: Worker(place, bases, all_bases))
        self._folder, self._jobs, self._seconds = folder, jobs, seconds
        self._running: dict[int, _Running] = {}
        self._selector = selectors.DefaultSelector()

    def run(self, seeds: Iterator[int], *, until: float = float("inf")) -> Iterator[dict[str, Any]]:
        """Results as they come.

        Args:
            until: no seed is begun after this time of the monotonic clock.
        """
        waiting: list[list[int]] = []
        try:
            while True:
                while len(self._running) < self._jobs and time.monotonic() < until:
                    batch = waiting.pop() if waiting else _take(seeds, _BATCH)
                    if not batch:
                        break
                    self._start(batch, until)
                if not self._running:
                    return
                for key, _ in self._selector.select(timeout=0.25):
                    running: _Running = key.data
                    data = os.read(running.pipe, 1 << 16)
                    if data:
                        yield from self._hear(running, data)
                    else:
                        yield from self._end(running, waiting)
                for running in list(self._running.values()):
                    self._watch(running)
        finally:
            for running in self._running.values():
                os.kill(running.process, signal.SIGKILL)
                os.waitpid(running.process, 0)

    def _start(self, seeds: list[int], until: float) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        slot = next(i for i in range(self._jobs) if not any(i == k for k in self._running))
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.close(read)
                worker = self._make(self._folder / f"slot-{slot}")
                serve(worker, seeds, write, until=until)
                code = 0
            except BaseException as err:
                _last_words(write, err)
            finally:
                os._exit(code)
        os.close(write)
        running = _Running(process, read, seeds, since=time.monotonic())
        self._running[slot] = running
        self._selector.register(read, selectors.EVENT_READ, running)

    def _hear(self, running: _Running, data: bytes) -> Iterator[dict[str, Any]]:
        *lines, running.buffer = (running.buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "begun" in message:
                running.seed, running.since = message["begun"], time.monotonic()
                running.used = _processor_seconds(running.process)
            elif "broken" in message:
                running.killed = f"the fuzzer itself failed: {message['broken']}"
            else:
                running.done.add(message["done"])
                running.seed = None
                yield message["result"] or {"seed": message["done"], "outcome": "skipped"}

    def _end(self, running: _Running, waiting: list[list[int]]) -> Iterator[dict[str, Any]]:
        """A worker is gone: what it had begun is a finding, what it had not is begun anew."""
        self._selector.unregister(running.pipe)
        os.close(running.pipe)
        _, status = os.waitpid(running.process, 0)
        slot = next(i for i, other in self._running.items() if other is running)
        del self._running[slot]
        if running.seed is not None:
            running.done.add(running.seed)
            code = os.waitstatus_to_exitcode(status)
            ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            yield {
                "seed": running.seed,
                "outcome": "hang" if running.killed else "crash",
                "problem": running.killed or f"the process ended with {ended}",
            }
        left = [seed for seed in running.seeds if seed not in running.done]
        if left:
            waiting.append(left)

    def _watch(self, running: _Running) -> None:
        if running.seed is None or running.killed:
            return
        waited = time.monotonic() - running.since
        if waited < min(self._seconds, 5):
            return
        used = _processor_seconds(running.process) - running.used
        is_build = base_and_operation(running.seed)[1] == "build"
        allowed = _BUILD_SECONDS if is_build else self._seconds
        if used > allowed or waited > _STUCK_SECONDS + allowed:
            running.killed = f"a hang: {used:.0f} s of the processor, {waited:.0f} s of the clock"
            os.kill(running.process, signal.SIGKILL)


def _take(seeds: Iterator[int], count: int) -> list[int]:
    found = []
    for _ in range(count):
        seed = next(seeds, None)
        if seed is None:
            break
        found.append(seed)
    return found


def _processor_seconds(process: int) -> float:
    """What a process has used of the processor. Source: proc(5), /proc/PID/stat."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _last_words(pipe: int, err: BaseException) -> None:
    import traceback

    text = "".join(traceback.format_exception(err))[-2000:]
    os.write(pipe, (json.dumps({"broken": text}) + "\n").encode("ascii"))
