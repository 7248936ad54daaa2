"""How dense weights are stored, and how many bytes that takes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pleexport.model import Weight
from pleexport.quantize import groups

WEIGHT_DTYPES = ("fp32", "fp16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}
# `MatMulNBits` takes these; smaller blocks are slower, larger ones lose more.
BLOCK_SIZES = (16, 32, 64, 128, 256)
DEFAULT_BLOCK_SIZE: Final = 256
# By precision of a weight, what it is stored as in an int4 bundle; docs/quantization.md has the
# measurements behind it.
_INT4_BUNDLE = {"quantizable": "int4", "head": "int8", "sensitive": "int8"}


@dataclass(frozen=True)
class WeightFormat:
    """What a build asks for.

    Attributes:
        dtype: one of `WEIGHT_DTYPES`.
        block_size: how many weights may share a scale, along the inputs of a matrix.
        symmetric: one zero point for all blocks; otherwise each has its own.
        head_dtype: of the output head; None for what goes with `dtype`.
    """

    dtype: str
    block_size: int = DEFAULT_BLOCK_SIZE
    symmetric: bool = True
    head_dtype: str | None = None

    def stored_dtype(self, weight: Weight) -> str:
        """The dtype of one weight: norms and other vectors stay fp32."""
        if weight.precision == "full":
            return "fp32"
        if weight.precision == "head" and self.head_dtype is not None:
            return self.head_dtype
        return _INT4_BUNDLE[weight.precision] if self.dtype == "int4" else self.dtype

    def block_size_of(self, weight: Weight) -> int:
        """Weights that share a scale in one matrix.

        Rows are padded to whole blocks: of the sizes allowed, it is the one with fewest bytes.
        """
        allowed = [size for size in BLOCK_SIZES if size <= self.block_size]
        return min(reversed(allowed), key=lambda size: self._block_bytes(weight, size))

    def stored_bytes(self, weight: Weight) -> int:
        """Bytes in the graph's data file: for int8 and int4 codes, float32 scales, zero points."""
        dtype = self.stored_dtype(weight)
        if dtype not in BITS:
            return weight.size * (2 if dtype == "fp16" else 4)
        return self._block_bytes(weight, self.block_size_of(weight))

    def _block_bytes(self, weight: Weight, block_size: int) -> int:
        """Bytes of a matrix in blocks of a given size."""
        outputs, inputs = weight.shape
        bits, blocks = BITS[self.stored_dtype(weight)], groups(inputs, block_size)
        zero_points = 0 if self.symmetric else groups(blocks * bits, 8)
        return outputs * (blocks * (block_size * bits // 8 + 4) + zero_points)

    def resident_bytes(self, weight: Weight) -> int:
        """Bytes in memory: ONNX Runtime raises fp16 weights to fp32 when it loads them."""
        factor = 2 if self.stored_dtype(weight) == "fp16" else 1
        return factor * self.stored_bytes(weight)
