"""How a dense weight is stored, and how many bytes that takes. Needs no torch."""

from __future__ import annotations

from pleexport.families.base import Weight
from pleexport.quantize import groups

WEIGHT_DTYPES = ("fp32", "fp16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32


def stored_dtype(weight: Weight, weight_dtype: str) -> str:
    """The dtype a weight is stored in when the build asks for `weight_dtype`.

    Norms and other vectors stay fp32; sensitive matrices keep at least 8 bits.
    """
    if weight.precision == "full":
        return "fp32"
    if weight.precision == "sensitive" and weight_dtype == "int4":
        return "int8"
    return weight_dtype


def stored_bytes(weight: Weight, weight_dtype: str, block_size: int = BLOCK_SIZE) -> int:
    """Bytes of a weight in the graph's data file; codes and float32 scales for int8 and int4."""
    dtype = stored_dtype(weight, weight_dtype)
    if dtype in BITS:
        outputs, inputs = weight.shape
        blocks = outputs * groups(inputs, block_size)
        return blocks * (block_size * BITS[dtype] // 8 + 4)
    return weight.size * (2 if dtype == "fp16" else 4)
