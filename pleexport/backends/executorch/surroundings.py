"""Other packages change what belongs to the whole process; here they cannot."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pleexport.progress import quiet

# As C++ begins a line of its log: `[threadpool.cpp:66] Resetting threadpool to 1 threads.`
_LOGGED = re.compile(r"^\[\w+\.(cpp|h):\d+\] .*\n?", re.MULTILINE)
_one_at_a_time = threading.Lock()
_LOGGERS = ("executorch", "torch.export", "torch.fx", "torch.utils._pytree")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Silence ExecuTorch and torch.export, and take back the log handlers that they install."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings(), quiet(*_LOGGERS):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep what ExecuTorch's C++ logs off standard error, where it stands before our own sentence.

    It writes to the file, and from calls of its binding to `sys.stderr`, which may be something
    else. What anybody else writes to either comes when the body ends. The file is watched on Linux
    only.
    """
    with _one_at_a_time, _without_log_in_python(), _without_log_in_file():
        yield


@contextmanager
def unlogged_call() -> Iterator[None]:
    """The same for a call of a method, which writes to `sys.stderr` alone; it is faster."""
    with _one_at_a_time, _without_log_in_python():
        yield


@contextmanager
def _without_log_in_python() -> Iterator[None]:
    own, caught = sys.stderr, io.StringIO()
    sys.stderr = caught
    try:
        yield
    finally:
        sys.stderr = own
        if (said := caught.getvalue()) and own:
            own.write(_LOGGED.sub("", said))


@contextmanager
def _without_log_in_file() -> Iterator[None]:
    if not hasattr(os, "memfd_create"):
        yield
        return
    caught, own = os.memfd_create("stderr"), os.dup(2)
    os.dup2(caught, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        if size := os.fstat(caught).st_size:
            said = os.pread(caught, size, 0).decode("utf-8", "surrogateescape")
            os.write(2, _LOGGED.sub("", said).encode("utf-8", "surrogateescape"))
        os.close(caught)
