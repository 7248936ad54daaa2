"""The files of an ONNX graph, and how ONNX Runtime opens them."""

from __future__ import annotations

import os
from pathlib import Path

from pleexport.errors import VERIFY_HINT, BundleError

# ONNX Runtime would write an id of this device, and send usage to its makers. It looks when it is
# imported, which happens below this folder only.
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_before = os.environ.get(_TELEMETRY)
os.environ[_TELEMETRY] = _before or "1"
try:
    import onnxruntime as ort
finally:
    if _before is None:
        del os.environ[_TELEMETRY]

GRAPH = "model.onnx"
GRAPH_DATA = "model.onnx.data"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
_PROVIDERS = ["CPUExecutionProvider"]


def data_file(number: int) -> str:
    """Name of a file of weights; the first one is number 0."""
    return f"{GRAPH_DATA}.{number}" if number else GRAPH_DATA


def session_options(threads: int, *, spin: bool) -> ort.SessionOptions:
    """Options of a session that generates text.

    Args:
        threads: 0 for one a core.
        spin: see `Runner`.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # A plan of all memory of a call is kept for each number of tokens, and none saves time.
    options.enable_mem_pattern = False
    # Smaller pieces of work at the end of an operator: threads wait less for each other.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    return options


def give_back_memory() -> ort.RunOptions:
    """Options of a call whose scratch memory is given back to the system at its end."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def open_graph(graph: Path | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on a graph's file, or on its bytes.

    Raises:
        BundleError: the graph cannot be loaded.
    """
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(graph, options, providers=_PROVIDERS, enable_fallback=0)
    except Exception as err:  # ONNX Runtime raises its own types, which share no base
        where = f"`{graph}`" if isinstance(graph, Path) else "the graph"
        raise BundleError(
            f"{where} cannot be loaded: {err}",
            hint=VERIFY_HINT,
        ) from err
