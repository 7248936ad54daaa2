"""Work on several things at once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Like `map`, on as many threads as there are cores; NumPy lets them run at once.

    One result for each thread waits at most, so that memory stays bounded when the consumer (a
    disk) is slower than the work.
    """
    threads = os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Work:
    """One piece of work that several threads do: how far it is, and whether to go on.

    Args:
        update: called with the number of bytes done since its last call, from any thread.
    """

    def __init__(self, update: Callable[[int], object] = lambda _: None) -> None:
        self._update = update
        self._stopped = threading.Event()

    def advance(self, nbytes: int) -> None:
        """Report bytes as done.

        Raises:
            CancelledError: another thread failed.
        """
        if self._stopped.is_set():
            raise CancelledError
        self._update(nbytes)

    def stop(self) -> None:
        """Let every thread fail at its next report."""
        self._stopped.set()


@contextmanager
def beside(function: Callable[[], Result], work: Work) -> Iterator[Future[Result]]:
    """Run a function on a thread beside the body; where one fails, the other is stopped.

    Raises:
        Exception: the function's own, also where the body was cancelled for it.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function)
        future.add_done_callback(lambda done: work.stop() if done.exception() else None)
        try:
            yield future
        except CancelledError:
            future.result()
            raise
        except BaseException:
            work.stop()
            raise
