"""How a build wants dense weights to be stored, whatever the backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from pleexport.dtypes import QUANTIZED, WeightDtype
from pleexport.model import Weight

BlockSize = Literal[16, 32, 64, 128, 256]
BLOCK_SIZES: tuple[BlockSize, ...] = get_args(BlockSize)
DEFAULT_BLOCK_SIZE: Final = 256
# By precision of a weight, what it is stored as in an int4 bundle; docs/quantization.md has the
# measurements behind it.
_INT4_BUNDLE: dict[str, WeightDtype] = {
    "quantizable": "int4",
    "head": "int8",
    "sensitive": "int8",
}


@dataclass(frozen=True)
class WeightRequest:
    """What a build asks for.

    Attributes:
        block_size: how many weights may share a scale, along the inputs of a matrix.
        symmetric: one zero point for all blocks; otherwise each has its own.
        head_dtype: of the output head; None for what goes with `dtype`.
        dtypes: of matrices that are stored otherwise, by name.
        trained_grid: matrices that were trained for a grid of 4 bits are stored on it.
        per_channel: codes have one scale for each output of a matrix, for runtimes that multiply
            such integers far faster than blocks. What is rounded has 8 bits.
    """

    dtype: WeightDtype
    block_size: BlockSize = DEFAULT_BLOCK_SIZE
    symmetric: bool = True
    head_dtype: WeightDtype | None = None
    dtypes: Mapping[str, WeightDtype] = field(default_factory=dict)
    trained_grid: bool = True
    per_channel: bool = False

    def on_grid(self, weight: Weight) -> bool:
        """Whether a weight is stored on the grid of 4 bits that it was trained for.

        In any build that rounds: it takes half the bytes of 8 bits, and loses as little.
        """
        own = weight.precision == "head" and self.head_dtype is not None
        follows = self.head_dtype == "int4" if own else self._asked_for(weight) in QUANTIZED
        return self.trained_grid and not self.per_channel and weight.on_grid and follows

    def keeps_codes(self, weight: Weight) -> bool:
        """Whether a weight is stored with the checkpoint's own codes."""
        if weight.codes is None or self._asked_for(weight) != "source":
            return False
        one_scale = weight.codes.group_size >= weight.shape[1] and not weight.codes.zero_points
        return one_scale or not self.per_channel

    def dtype_of(self, weight: Weight) -> str:
        """The dtype of one weight: norms and other vectors stay fp32.

        A matrix that a quantized checkpoint holds in numbers is stored in 8 bits, as the sensitive
        ones of an int4 bundle are: in float32 it would be read longer than most matrices together.
        """
        asked = self._asked_for(weight)
        if weight.precision == "full":
            return "fp32"
        if self.per_channel and asked in ("source", *QUANTIZED) and not self.keeps_codes(weight):
            return "int8"
        if self.on_grid(weight):
            return "int4"
        if asked == "source":
            return weight.codes.dtype if weight.codes else "int8"
        return asked

    def _asked_for(self, weight: Weight) -> WeightDtype:
        if weight.name in self.dtypes:
            return self.dtypes[weight.name]
        if weight.precision == "head" and self.head_dtype is not None:
            return self.head_dtype
        if self.dtype == "int4" and weight.precision != "full":
            return _INT4_BUNDLE[weight.precision]
        return self.dtype
