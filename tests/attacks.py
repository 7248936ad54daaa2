"""Write small safetensors files, sound ones and malformed ones, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pleexport.dtypes import BY_SAFETENSORS

NAMES = {row.numpy: name for name, row in BY_SAFETENSORS.items()}


def write_raw(path: Path, header: Any, data: bytes = b"", *, pad_to: int = 8) -> Path:
    """Write a file with any header at all: an object, or bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = raw.ljust(-(-(8 + len(raw)) // pad_to) * pad_to - 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def write_tensors(path: Path, tensors: dict[str, Any]) -> Path:
    """Write a sound file; unlike the library, this writes bfloat16 arrays too."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return write_raw(path, header, data)
