"""The header of a file from anywhere is checked before anything in it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attacks import write_raw, write_tensors

from pleexport.errors import CheckpointError
from pleexport.safetensors_file import SafetensorsFile


def entry(dtype: str, shape: Any, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", "not valid JSON"),
    "a key twice": (b'{"a":{},"a":{}}', b"", "a key appears twice"),
    "half a surrogate pair": (rb'{"__metadata__":{"a":"\ud800"}}', b"", "surrogates not allowed"),
    "half a surrogate pair as a key": (rb'{"\ud800":{}}', b"", "surrogates not allowed"),
    "nested too deep": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": ([1], b"", "not a JSON object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "not a map from string to string"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x", "malformed header entry"),
    "negative shape": ({"a": entry("U8", [-1], 0, 1)}, b"x", "malformed header entry"),
    "boolean shape": ({"a": entry("U8", [True], 0, 1)}, b"x", "malformed header entry"),
    "unknown dtype": ({"a": entry("U7", [1], 0, 1)}, b"x", "unknown dtype `U7`"),
    "wrong size": ({"a": entry("F32", [2], 0, 4)}, b"1234", "needs 8"),
    "beyond the end": ({"a": entry("U8", [9], 0, 9)}, b"1234", "is truncated"),
    "overlap": (
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)},
        b"123",
        "overlaps another tensor",
    ),
    "hole": (
        {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)},
        b"123",
        "follows a hole",
    ),
    "surplus": ({"a": entry("U8", [1], 0, 1)}, b"123", "2 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    header, data, message = MALFORMED[name]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path, error=CheckpointError)
    told = f"{caught.value.message} {caught.value.hint}"
    assert message in told
    assert str(path) in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"\xff" * 8, "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid x\n", "is a Git LFS pointer"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path, error=CheckpointError)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsFile(tmp_path / "x", error=CheckpointError)


def test_arrays_are_views_of_the_stored_values(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.array(3, dtype=np.int64),
    }
    file = SafetensorsFile(write_tensors(tmp_path / "x", tensors), error=CheckpointError)
    for name, expected in tensors.items():
        got = file.array(name)
        assert got.dtype == expected.dtype
        assert not got.flags.owndata
        np.testing.assert_array_equal(got, expected)
