"""What the machine can do, as limits to compare results with, and what is installed on it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("pleexport", "onnxruntime", "numpy", "torch", "transformers", "xllamacpp", "gguf")
_READ_VALUES = 100_000_000  # float32, 400 MB: far more than any cache holds
_FILE_BYTES = 1 << 30
_COLD_READS = 500


def describe(folder: Path, threads: int) -> dict[str, Any]:
    """Processor, versions and measured limits; `folder` is on the disk to measure."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "memory_read_gb_per_second": memory_read(threads) / 1e9,
        **disk(folder),
    }


def memory_read(threads: int) -> float:
    """Bytes per second at which `threads` threads read memory; the best of five."""
    values = np.ones(_READ_VALUES, dtype=np.float32)
    parts = np.array_split(values, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, values.nbytes / (time.perf_counter() - started))
    return best


def disk(folder: Path) -> dict[str, float]:
    """Sequential writing and reading, and reading 4 KiB at a random place, past the page cache."""
    path = folder / "disk-test.bin"
    block = np.random.default_rng(0).bytes(1 << 20)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(_FILE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - started
        with path.open("rb") as file:
            _forget(file.fileno())
            started = time.perf_counter()
            while file.read(1 << 20):
                pass
            read = time.perf_counter() - started
            _forget(file.fileno())
            places = np.random.default_rng(1).integers(0, _FILE_BYTES >> 12, _COLD_READS) << 12
            started = time.perf_counter()
            for place in places.tolist():
                os.pread(file.fileno(), 4096, place)
            cold = (time.perf_counter() - started) / _COLD_READS
    finally:
        path.unlink(missing_ok=True)
    return {
        "disk_write_gb_per_second": _FILE_BYTES / written / 1e9,
        "disk_read_gb_per_second": _FILE_BYTES / read / 1e9,
        "cold_4k_read_microseconds": cold * 1e6,
    }


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache. Source: mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)
        pages = -(-len(view) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        if libc.mincore(address, length, resident):
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        share = float((np.frombuffer(resident, dtype=np.uint8) & 1).mean())
        del view
    return share


def _forget(descriptor: int) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
