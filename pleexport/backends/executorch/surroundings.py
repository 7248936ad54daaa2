"""Other packages change what belongs to the whole process; here they cannot."""

from __future__ import annotations

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
_LOGGED = re.compile(rb"\[\w+\.(cpp|h):\d+\] ")
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

    What anybody else writes there comes when the body ends. On Linux; elsewhere nothing is kept
    back.
    """
    if not hasattr(os, "memfd_create"):
        yield
        return
    with _one_at_a_time, os.fdopen(os.memfd_create("stderr"), "r+b") as caught:
        sys.stderr.flush()
        own = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            caught.seek(0)
            os.write(2, b"".join(line for line in caught if not _LOGGED.match(line)))
