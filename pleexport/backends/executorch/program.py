"""A `.pte` file and ExecuTorch's runtime for it. The one module that loads their binding."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pleexport.backends.executorch.surroundings import unlogged
from pleexport.errors import VERIFY_HINT, BundleError, CheckFailed

METHOD = "forward"
_IDENTIFIER = b"ET12"
_CHECK = """import sys
sys.path[:] = {paths!r}
from pathlib import Path
from pleexport.backends.executorch.program import load
load(Path({path!r}))
"""


@functools.cache
def runtime() -> Any:
    """ExecuTorch's Python binding, with the kernels for caches and attention."""
    # Not through `portable_lib`, which is this and imports all that lowers: two seconds more.
    binding = importlib.import_module("executorch.extension.pybindings._C")
    folder = Path(binding.__file__ or "").parents[1] / "llm" / "custom_ops"
    (library,) = folder.glob("*custom_ops_aot_lib.*")
    torch.ops.load_library(str(library))
    return binding


def use_threads(count: int) -> None:
    """Let all programs of this process compute with so many threads."""
    with unlogged():
        runtime()._unsafe_reset_threadpool(count)


def load(path: Path) -> tuple[Any, Any]:
    """A program and its method; the program has to live as long.

    Raises:
        BundleError: it cannot be loaded.
    """
    try:
        if not path.is_file():
            raise RuntimeError("there is no such file")
        with path.open("rb") as file:
            if file.read(8)[4:] != _IDENTIFIER:  # which ExecuTorch quotes, and ends where it cannot
                raise RuntimeError("it is no program of ExecuTorch 1.5")
        with unlogged():
            binding = runtime()
            # Otherwise an offset that leads out of the file ends the process.
            checks = binding.Verification.InternalConsistency
            program = binding._load_program(str(path), program_verification=checks)
            return program, program.load_method(METHOD)
    except RuntimeError as err:
        raise BundleError(
            f"`{path}` cannot be loaded: {err}",
            hint=VERIFY_HINT,
        ) from err


def check_loads(path: Path) -> None:
    """Load a program that was just written, in a process of its own.

    XNNPACK refuses some things only then, and copies all weights into memory. Neither that memory
    nor a crash is this process's.

    Raises:
        CheckFailed: it does not load.
    """
    code = _CHECK.format(paths=sys.path, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["the process crashed"])[-1]
        raise CheckFailed(
            f"`{path.name}` was written and cannot be loaded: {why}",
            hint="this is an error of pleexport; `--backend onnx` may work meanwhile",
        )
