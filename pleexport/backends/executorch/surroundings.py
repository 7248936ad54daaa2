"""Other packages change what belongs to the whole process; here they cannot."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pleexport.progress import quiet

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
