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


@contextmanager
def beside(work: Callable[[Callable[[], None]], Result]) -> Iterator[Future[Result]]:
    """Run `work` on a thread beside the body, and wait for it at the end.

    Args:
        work: gets a function to call now and then, which raises once the body has failed.
    """
    failed = threading.Event()

    def check() -> None:
        if failed.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, check)
        try:
            yield future
        except BaseException:
            failed.set()
            raise
