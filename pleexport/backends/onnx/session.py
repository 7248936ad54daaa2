"""Open a bundle's graph in ONNX Runtime, with weights copied into memory or mapped.

ONNX Runtime rearranges weights for the processor when it loads them, into memory of the process.
It can also write them rearranged, and map that file the next time: then the weights cost no
anonymous memory, and loading takes no longer than mapping.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

import onnxruntime as ort

from pleexport.errors import BundleError, RunnerError
from pleexport.runtime.bundle import GRAPH, GRAPH_DATA, Bundle

MOST_THREADS = 256
_PROVIDERS = ["CPUExecutionProvider"]
# The rearranged weights, and what is stored beside them.
_PACKED_SHARE = 2.2


def open_session(
    bundle: Bundle, *, threads: int = 0, packed_weights: Path | None = None
) -> ort.InferenceSession:
    """A session on a bundle's graph.

    Args:
        threads: 0 for one a core.
        packed_weights: a folder that keeps weights rearranged for this processor and this version
            of ONNX Runtime; they are written at the first use, and mapped from then on.
    Raises:
        RunnerError: an impossible number of threads, or a folder that cannot be used.
        BundleError: the graph cannot be loaded.
    """
    if not 0 <= threads <= MOST_THREADS:
        raise RunnerError(f"threads is {threads}; it must be 0 to {MOST_THREADS}")
    path = bundle.graph_path if packed_weights is None else _packed(bundle, packed_weights)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Smaller pieces of work at the end of an operator: threads wait less for each other.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    return _load(path, options)


def _load(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(path, options, providers=_PROVIDERS)
    except Exception as err:  # ONNX Runtime raises its own types, which share no base
        raise BundleError(f"`{path}` cannot be loaded: {err}") from err


def _packed(bundle: Bundle, folder: Path) -> Path:
    """The graph with rearranged weights, written if it is not there."""
    place = folder / _key(bundle)
    if not (place / GRAPH).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        except OSError as err:
            raise RunnerError(
                f"`{folder}` is no folder that can be written to: {err.strerror}",
                hint="choose another folder for the packed weights",
            ) from err
        try:
            _write_packed(bundle, staging)
            try:
                staging.rename(place)
            except OSError:
                if not (place / GRAPH).is_file():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return place / GRAPH


def _write_packed(bundle: Bundle, folder: Path) -> None:
    size = (bundle.path / GRAPH_DATA).stat().st_size
    free, needed = shutil.disk_usage(folder).free, int(size * _PACKED_SHARE)
    if free < needed:
        raise RunnerError(
            f"`{folder.parent}` has {free / 1e9:.2f} GB free; packed weights need up to "
            f"{needed / 1e9:.2f} GB",
            hint="free some space, or choose another folder for the packed weights",
        )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / GRAPH)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", GRAPH_DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    _load(bundle.graph_path, options)


def _key(bundle: Bundle) -> str:
    """Names what the rearranged weights depend on: the graph, the runtime, the processor."""
    digests = {record.name: record.sha256 for record in bundle.manifest.files}
    parts = [digests[GRAPH], digests[GRAPH_DATA], ort.__version__, _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """Model and instruction sets, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    lines = sorted({line for line in lines if line.startswith(told)})
    return "\n".join([platform.machine(), platform.processor(), os.name, *lines])
