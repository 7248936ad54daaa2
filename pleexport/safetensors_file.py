"""Read the header of a safetensors file and view its tensors without copying them.

The `safetensors` package hands out copies and cannot represent bfloat16 in NumPy, so the few rules
of the format are checked here: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pleexport.dtypes import BY_SAFETENSORS, numpy_dtype
from pleexport.errors import PleexportError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32  # more than NumPy needs and less than it allows
_GIT_LFS_POINTER = b"version https://git-lfs"
_CHECK = "check the file and its permissions"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at byte `offset` of the file.

    Attributes:
        dtype: see `pleexport.dtypes`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class SafetensorsFile:
    """A memory-mapped safetensors file whose header has been checked.

    Args:
        path: the file.
        error: exception class to raise, so that a blob and a checkpoint speak for themselves.
    Raises:
        PleexportError: (as `error`) the file is missing, truncated or malformed.
    """

    def __init__(self, path: Path, *, error: type[PleexportError]) -> None:
        self.path = path
        self._error = error
        header, self.data_offset, self.file_bytes = self._read_header()
        self.metadata: dict[str, str] = self._checked_metadata(header.pop("__metadata__", {}))
        self.entries: dict[str, TensorEntry] = {
            name: self._checked_entry(name, value) for name, value in header.items()
        }
        self._check_layout()

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The whole file, mapped read-only at first use."""
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as err:
            raise self._fail(f"cannot be mapped: {err.strerror}", _CHECK) from err

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of tensor `name` in its stored dtype; nothing is copied."""
        entry = self.entries[name]
        raw = np.frombuffer(self.mapping, np.uint8, count=entry.nbytes, offset=entry.offset)
        return raw.view(numpy_dtype(entry.dtype)).reshape(entry.shape)

    def _fail(
        self, what: str, hint: str = "the file may be damaged; fetch or copy it again"
    ) -> PleexportError:
        return self._error(f"`{self.path}` {what}", hint=hint)

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        try:
            with self.path.open("rb") as file:
                file_bytes = file.seek(0, 2)
                file.seek(0)
                prefix = file.read(8)
                header_bytes = int.from_bytes(prefix, "little")
                if (prefix + file.read(16)).startswith(_GIT_LFS_POINTER):
                    raise self._fail(
                        "is a Git LFS pointer, not the file itself", "run `git lfs pull`"
                    )
                if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                    raise self._fail(
                        f"is not a safetensors file: its header claims {header_bytes} bytes of "
                        f"{file_bytes}",
                        "the copy may be truncated; fetch it again",
                    )
                file.seek(8)
                raw = file.read(header_bytes)
        except OSError as err:
            raise self._fail(f"cannot be read: {err.strerror}", _CHECK) from err
        try:
            header = json.loads(raw, object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError) as err:
            raise self._fail(f"has a header that is not valid JSON ({err})") from err
        if not isinstance(header, dict):
            raise self._fail("has a header that is not a JSON object")
        return header, 8 + header_bytes, file_bytes

    def _checked_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("has `__metadata__` that is not a map from string to string")
        return metadata

    def _checked_entry(self, name: str, value: Any) -> TensorEntry:
        try:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            integers = [*shape, begin, end]
            if not all(type(n) is int and 0 <= n < 2**63 for n in integers):
                raise ValueError
            if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS:
                raise ValueError
        except (KeyError, TypeError, ValueError) as err:
            raise self._fail(f"has a malformed header entry for tensor `{name}`") from err
        if dtype not in BY_SAFETENSORS:
            raise self._fail(f"has tensor `{name}` of unknown dtype `{dtype}`")
        known = BY_SAFETENSORS[dtype]
        expected = math.prod(shape) * known.bits // 8
        if end - begin != expected:
            raise self._fail(
                f"gives tensor `{name}` {end - begin} bytes; {dtype} {shape} needs {expected}"
            )
        if self.data_offset + end > self.file_bytes:
            raise self._fail(
                f"ends at byte {self.file_bytes}, before tensor `{name}` "
                f"(byte {self.data_offset + end})",
                "the copy is truncated; fetch it again",
            )
        return TensorEntry(name, known.name, tuple(shape), self.data_offset + begin, expected)

    def _check_layout(self) -> None:
        position = self.data_offset
        for entry in sorted(self.entries.values(), key=lambda e: (e.offset, e.nbytes)):
            if entry.offset != position:
                problem = "overlaps another tensor" if entry.offset < position else "follows a hole"
                raise self._fail(f"has tensor `{entry.name}` at a place that {problem}")
            position += entry.nbytes
        if position != self.file_bytes:
            raise self._fail(f"has {self.file_bytes - position} bytes that belong to no tensor")


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object, for `json.loads`.

    Raises:
        ValueError: a key appears twice, or a string is half a surrogate pair, which is no text.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    for text in itertools.chain.from_iterable(pairs):
        if isinstance(text, str):
            text.encode()
    return result
