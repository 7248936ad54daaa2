"""A limit of time and memory for chat templates, which are not trusted."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from jinja2 import TemplateError

from pleexport.process import memory

T = TypeVar("T")

SECONDS = 2.0
# What a template may add to the memory of this process.
_MORE_BYTES = 256 << 20
_BETWEEN_LOOKS = 0.01  # seconds


def within_limits(work: Callable[[], T], seconds: float = SECONDS) -> T:
    """Do some work of Python code, unless it takes longer, or more memory.

    A thread beside it looks every 10 ms, which costs a short template nothing; tracing each line
    takes three to nine times as long. One step of C code cannot be stopped: the sandbox of
    `chat.py` refuses those that could be very large.

    Args:
        seconds: of this thread's processor time where the system tells it, so that a busy machine
            refuses no more than an idle one; else of time.
    Raises:
        TemplateError: it was stopped.
    """
    watch = _Watch(threading.get_ident(), seconds)
    told = sys.unraisablehook

    def tell(args: sys.UnraisableHookArgs) -> None:
        # Raised where a generator is closed, it goes nowhere; the watch raises it once more.
        if not isinstance(args.exc_value, _Stopped | RecursionError | MemoryError):
            told(args)

    sys.unraisablehook = tell
    try:
        try:
            threading.Thread(target=watch.look_on, daemon=True).start()
            return work()
        finally:
            watch.is_armed = False  # a step that cannot be stopped: at most one more is on its way
            watch.end()
    except _Stopped:
        watch.end()
    finally:
        sys.unraisablehook = told
    raise TemplateError(watch.problem)


class _Stopped(BaseException):
    """Not an Exception: jinja takes one in what it computes beforehand for no reason to stop."""


class _Watch:
    """Raises `_Stopped` in a thread that is over a limit, again and again while it is armed.

    Attributes:
        problem: which limit it is over, as a clause.
    """

    def __init__(self, thread: int, seconds: float) -> None:
        self.is_armed, self.problem = True, ""
        self._thread, self._seconds = thread, seconds
        self._clock = _clock(thread)
        self._started = self._clock()
        self._ended = threading.Event()
        self._raising = threading.Lock()

    def look_on(self) -> None:
        most = None
        while not self._ended.wait(_BETWEEN_LOOKS):
            taken = memory().anonymous or 0
            most = most or taken + _MORE_BYTES
            if self._clock() - self._started > self._seconds:
                self.problem = f"it takes longer than {self._seconds:g} seconds"
            elif taken > most:
                self.problem = f"it takes more than {_MORE_BYTES >> 20} MiB of memory"
            with self._raising:
                if self.problem and self.is_armed:
                    _raise_in(self._thread, _Stopped)

    def end(self) -> None:
        """Take back what was not yet raised; after it nothing is."""
        self._ended.set()
        with self._raising:
            _raise_in(self._thread, None)


def _clock(thread: int) -> Callable[[], float]:
    """Seconds of the processor that a thread has taken, or of time."""
    if not hasattr(time, "pthread_getcpuclockid"):  # macOS, Windows
        return time.perf_counter
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Have a thread raise an exception at its next step; None takes back what it has not raised.

    Source: the documentation of Python's C interface, `PyThreadState_SetAsyncExc`.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind)
    )
