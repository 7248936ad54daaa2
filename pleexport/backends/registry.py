"""The backends by name; a new one is one line here."""

from __future__ import annotations

import importlib
from typing import cast

from pleexport.backends.base import Backend

NAMES = ("onnx", "executorch")


def load(name: str) -> Backend:
    """The backend of that name, one of `NAMES`."""
    module = importlib.import_module(f"pleexport.backends.{name}.backend")
    return cast(Backend, module.BACKEND)
