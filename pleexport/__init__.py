"""Ship language models whose knowledge lies in lookup tables: split, export, prove, run."""

import os

# ONNX Runtime would write an id of this device, and send usage to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from pleexport.builder import build
from pleexport.bundle import Bundle
from pleexport.errors import PleexportError
from pleexport.inspection import ModelInfo, inspect
from pleexport.parity import ParityReport
from pleexport.runner import Runner, Stats, Token
from pleexport.verification import verify

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
