"""Ship language models whose knowledge lies in lookup tables: split, export, prove, run.

Names are loaded when they are asked for (PEP 562), so that what only runs a bundle loads nothing
that builds one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pleexport.errors import PleexportError
    from pleexport.export.builder import build
    from pleexport.export.options import BuildOptions
    from pleexport.export.packaging import package
    from pleexport.inspection.info import ModelInfo
    from pleexport.inspection.inspect import inspect
    from pleexport.parity.report import ParityReport
    from pleexport.parity.verify import verify
    from pleexport.runtime.bundle import Bundle
    from pleexport.runtime.runner import Runner
    from pleexport.runtime.stats import Stats, Token

_MODULES = {
    "BuildOptions": "pleexport.export.options",
    "Bundle": "pleexport.runtime.bundle",
    "ModelInfo": "pleexport.inspection.info",
    "ParityReport": "pleexport.parity.report",
    "PleexportError": "pleexport.errors",
    "Runner": "pleexport.runtime.runner",
    "Stats": "pleexport.runtime.stats",
    "Token": "pleexport.runtime.stats",
    "build": "pleexport.export.builder",
    "inspect": "pleexport.inspection.inspect",
    "package": "pleexport.export.packaging",
    "verify": "pleexport.parity.verify",
}

__all__ = [
    "BuildOptions",
    "Bundle",
    "ModelInfo",
    "ParityReport",
    "PleexportError",
    "Runner",
    "Stats",
    "Token",
    "build",
    "inspect",
    "package",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module `pleexport` has no attribute `{name}`")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
