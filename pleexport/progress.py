"""Progress on standard error: one line a step, and a bar where a step takes long."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from pleexport.errors import escaped


class Progress:
    """Tells a person what is going on.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            tqdm.write(escaped(text), file=sys.stderr)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step without a measure; says how long it took if that is worth saying."""
        started = time.perf_counter()
        live = not self.quiet and sys.stderr.isatty()
        if live:
            sys.stderr.write(f"{text} ...\r")
            sys.stderr.flush()
        yield
        self.note(f"{text}: {time.perf_counter() - started:.1f} s")

    @contextmanager
    def bytes(self, text: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar over bytes; the body calls what it is given with increments, from any thread."""
        with self._bar(text, total, unit="B", unit_scale=True) as update:
            yield update

    @contextmanager
    def count(self, text: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A bar over things; the body calls what it is given with increments."""
        with self._bar(text, total, unit=f" {unit}") as update:
            yield update

    @contextmanager
    def _bar(self, text: str, total: int, **options: object) -> Iterator[Callable[[int], object]]:
        started = time.perf_counter()
        # None: shown on a terminal only, so that logs are not filled with redrawn lines.
        disable = True if self.quiet else None
        lock = threading.Lock()
        with tqdm(total=total, desc=text, leave=False, disable=disable, **options) as bar:

            def update(done: int) -> None:
                with lock:
                    bar.update(done)

            yield update
        self.note(f"{text}: {time.perf_counter() - started:.1f} s")


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Let other libraries' loggers say errors only, and give them their levels back."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
