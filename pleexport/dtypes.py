"""The dtypes that occur, one row each, with the names that others give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

TableDtype = Literal["source", "fp32", "fp16", "bf16", "int8", "int4"]
WeightDtype = Literal["source", "fp32", "fp16", "int8", "int4"]
CacheDtype = Literal["fp32", "fp16", "int8", "none"]

TABLE_DTYPES: tuple[TableDtype, ...] = get_args(TableDtype)
WEIGHT_DTYPES: tuple[WeightDtype, ...] = get_args(WeightDtype)
CACHE_DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)


@dataclass(frozen=True)
class Dtype:
    """One dtype.

    Attributes:
        name: ours.
        bits: of one value.
        numpy: None where values are packed.
        safetensors: the name in a safetensors header; None where such files do not have it.
        torch: the name in torch, and in a config.json; None where torch lacks it.
    """

    name: str
    bits: int
    numpy: np.dtype[Any] | None
    safetensors: str | None
    torch: str | None


_ROWS = (
    Dtype("fp64", 64, np.dtype(np.float64), "F64", "float64"),
    Dtype("fp32", 32, np.dtype(np.float32), "F32", "float32"),
    Dtype("fp16", 16, np.dtype(np.float16), "F16", "float16"),
    Dtype("bf16", 16, np.dtype(ml_dtypes.bfloat16), "BF16", "bfloat16"),
    Dtype("fp8_e4m3", 8, np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3", "float8_e4m3fn"),
    Dtype("fp8_e5m2", 8, np.dtype(ml_dtypes.float8_e5m2), "F8_E5M2", "float8_e5m2"),
    Dtype("int64", 64, np.dtype(np.int64), "I64", "int64"),
    Dtype("int32", 32, np.dtype(np.int32), "I32", "int32"),
    Dtype("int16", 16, np.dtype(np.int16), "I16", "int16"),
    Dtype("int8", 8, np.dtype(np.int8), "I8", "int8"),
    Dtype("int4", 4, None, None, None),
    Dtype("int2", 2, None, None, None),
    Dtype("uint64", 64, np.dtype(np.uint64), "U64", "uint64"),
    Dtype("uint32", 32, np.dtype(np.uint32), "U32", "uint32"),
    Dtype("uint16", 16, np.dtype(np.uint16), "U16", "uint16"),
    Dtype("uint8", 8, np.dtype(np.uint8), "U8", "uint8"),
    Dtype("bool", 8, np.dtype(np.bool_), "BOOL", "bool"),
)
_BY_NAME = {row.name: row for row in _ROWS}
BY_SAFETENSORS = {row.safetensors: row for row in _ROWS if row.safetensors}
BY_TORCH = {row.torch: row for row in _ROWS if row.torch}

# What a trained model computes in, the constants of the original included.
COMPUTED = ("fp32", "fp16", "bf16")
# What a checkpoint's weights may be stored in.
FLOATS = (*COMPUTED, "fp64")
# What rows and matrices are rounded to, with a scale for each group of values.
QUANTIZED = ("int8", "int4")
# Codes that a blob's segments hold; those of 2 bits come from checkpoints that were trained for it.
CODED = (*QUANTIZED, "int2")
# By dtype, the floating-point dtypes that hold all its values.
LOSSLESS = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp32")}


def bits(name: str) -> int:
    """Bits of one value."""
    return _BY_NAME[name].bits


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype; of packed dtypes there is none."""
    dtype = _BY_NAME[name].numpy
    assert dtype is not None, name
    return dtype


def torch_name(name: str) -> str:
    """What torch calls it."""
    found = _BY_NAME[name].torch
    assert found is not None, name
    return found


def packed_bytes(count: int, name: str) -> int:
    """Bytes of so many values without a gap between them."""
    return -(-count * bits(name) // 8)


def rounded(value: float, name: str) -> float:
    """`value` as the original holds it after loading a checkpoint of that dtype."""
    array: NDArray[Any] = np.asarray(value, dtype=numpy_dtype(name))
    return float(array)
