"""Ship language models whose knowledge lies in lookup tables: split, export, prove, run."""

import os

# ONNX Runtime would write an id of this device, and send usage to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from pleexport.errors import PleexportError
from pleexport.export.builder import build
from pleexport.inspection.inspect import ModelInfo, inspect
from pleexport.parity.compare import ParityReport
from pleexport.parity.verify import verify
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.runner import Runner, Stats, Token

__all__ = [
    "Bundle",
    "ModelInfo",
    "ParityReport",
    "PleexportError",
    "Runner",
    "Stats",
    "Token",
    "build",
    "inspect",
    "verify",
]
