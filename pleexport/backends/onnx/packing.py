"""Weights as one processor wants them, written once and mapped from then on.

ONNX Runtime rearranges weights for the processor when it loads them, into memory of the process.
It can also write them rearranged, and map that file the next time: then the weights cost no
anonymous memory, and loading takes no longer than mapping.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from pleexport.backends.onnx.files import GRAPH, GRAPH_DATA, open_graph
from pleexport.checksums import (
    Checksums,
    check_files,
    checked_beside,
    file_checksums,
    read_checksums,
    write_checksums,
)
from pleexport.contract import Artifact
from pleexport.errors import BundleError, CheckFailed, InputError
from pleexport.sizes import size_text
from pleexport.staging import staged_folder

# The rearranged weights, and what is stored beside them.
_PACKED_SHARE = 2.2
_PREFIX, _ELSEWHERE = ".partial-", "choose another folder for the packed weights"


def packed_graph(
    bundle: Path, artifact: Artifact, folder: Path, *, checksums: Checksums | None
) -> Path:
    """The graph with rearranged weights, written if it is not there.

    Args:
        bundle: the folder of the graph as it was built.
        folder: keeps packed weights of any number of bundles.
        checksums: of the bundle; what is packed is compared with them. None to compare nothing.
    Raises:
        InputError: the folder cannot be used, or is on a full disk.
        BundleError: the graph cannot be loaded.
    """
    place = folder / _key(bundle, artifact, checked=checksums is not None)
    if not (place / GRAPH).is_file():
        with staged_folder(
            place, error=InputError, elsewhere=_ELSEWHERE, prefix=_PREFIX
        ) as staging:
            with checked_beside([bundle / name for name in artifact.files], checksums):
                _write_packed(bundle, artifact, staging)
            written = {path.name: file_checksums(path) for path in staging.iterdir()}
            write_checksums(staging, written)
    return place / GRAPH


@contextmanager
def checked_packed(graph: Path, *, check: bool) -> Iterator[None]:
    """Compare packed weights with their checksums while the body loads them.

    Args:
        check: False to compare nothing.
    Raises:
        CheckFailed: they are damaged.
    """
    if not check:
        yield
        return
    try:
        checksums = read_checksums(graph.parent)
        check_files([graph], checksums)
        with checked_beside([graph.with_name(GRAPH_DATA)], checksums):
            yield
    except CheckFailed as err:
        raise CheckFailed(
            err.message, hint=f"remove `{graph.parent}`; it is written again at the next use"
        ) from err


def _write_packed(bundle: Path, artifact: Artifact, folder: Path) -> None:
    """Let ONNX Runtime write a graph and its weights.

    Raises:
        InputError: there is too little room, or this ONNX Runtime cannot read what it writes.
        BundleError: the graph cannot be loaded.
        OSError: they cannot be written; ONNX Runtime does not say why.
    """
    size = sum((bundle / name).stat().st_size for name in artifact.files)
    free, needed = shutil.disk_usage(folder).free, int(size * _PACKED_SHARE)
    if free < needed:
        raise InputError(
            f"`{folder.parent}` has {size_text(free)} free; packed weights need up to "
            f"{size_text(needed)}",
            hint=f"free some space, or {_ELSEWHERE}",
        )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / GRAPH)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", GRAPH_DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    try:
        open_graph(bundle / GRAPH, options)
    except BundleError as err:
        open_graph(bundle / GRAPH, ort.SessionOptions())  # or is it the bundle?
        full = shutil.disk_usage(folder).free < needed
        raise OSError(code := errno.ENOSPC if full else errno.EIO, os.strerror(code)) from err
    try:
        open_graph(folder / GRAPH, ort.SessionOptions())
    except BundleError as err:  # up to 1.30, for two branches with initializers of one name
        raise InputError(
            f"onnxruntime {ort.__version__} cannot load the packed weights that it wrote itself",
            hint="leave the packed weights out, or take onnxruntime 1.31 or newer",
        ) from err


def _key(bundle: Path, artifact: Artifact, *, checked: bool) -> str:
    """Names what the rearranged weights depend on: the graph, the runtime, the processor.

    Weights that nobody compared with their checksums are never taken for those that were.
    """
    graph = hashlib.sha256((bundle / GRAPH).read_bytes()).hexdigest()
    state = "checked" if checked else "unchecked"
    parts = [graph, artifact.weights_digest, ort.__version__, _processor(), state]
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
