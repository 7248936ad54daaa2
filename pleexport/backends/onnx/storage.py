"""How weights are stored in an ONNX graph, and how many bytes that takes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pleexport.dtypes import CODED, bits, packed_bytes
from pleexport.model import Codes, Model, Weight
from pleexport.quantize import GRID_GROUP, Rounding
from pleexport.sizes import align, groups
from pleexport.weights import BLOCK_SIZES, WeightRequest

# Larger blocks of 2 bits are multiplied by unpacking the matrix, which takes 200 times as long.
_MOST_OF_2_BITS = 128
# Outputs of a panel of codes: with 16, a prompt is slower in WebAssembly; with 64, a single token.
PANEL = 32
# Stores limit the size of a file, and no packaging edits a graph.
LARGEST_DATA_FILE = 1 << 30
_PAGE = 4096
_CACHE_LINE = 64


def data_places(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """For tensors in their order, the number of the file and the byte at which each begins.

    A file ends before the tensor that would make it larger than `LARGEST_DATA_FILE`; a tensor that
    is larger has one alone.
    """
    number, position = 0, 0
    for size in sizes:
        offset = align(position, _PAGE if size >= _PAGE else _CACHE_LINE)
        if position and offset + size > LARGEST_DATA_FILE:
            number, offset = number + 1, 0
        yield number, offset
        position = offset + size


class OnnxStorage:
    """Matrices in int8 and int4 as `MatMulNBits` takes them, everything else as tensors.

    With one scale for each output, codes are what `MatMulInteger` takes, in panels of `PANEL`
    outputs. Those of 2 and 4 bits take 4 bits in the file, and 8 in memory.

    Attributes:
        symmetric: one zero point for all blocks; otherwise each has its own.
    """

    def __init__(self, request: WeightRequest) -> None:
        self._request = request
        self.symmetric = request.symmetric

    def dtype_of(self, weight: Weight) -> str:
        """The dtype that one weight is stored in."""
        dtype = self._request.dtype_of(weight)
        return "int4" if dtype == "int2" and self._request.per_channel else dtype

    def is_per_channel(self, weight: Weight) -> bool:
        """Whether a matrix is stored in codes with one scale for each output."""
        return self._request.per_channel and self.dtype_of(weight) in CODED

    def keeps_codes(self, weight: Weight) -> bool:
        """Whether a weight is stored with the checkpoint's own codes."""
        return self._request.keeps_codes(weight)

    def rounding_of(self, weight: Weight) -> Rounding:
        """How a weight that is rounded finds its scales."""
        return "grid" if self._request.on_grid(weight) else "searched"

    def has_zero_points(self, weight: Weight) -> bool:
        """Whether each block of a weight that is stored in codes has a zero point of its own."""
        if weight.codes and self.keeps_codes(weight):
            return bool(weight.codes.zero_points)
        return not self.symmetric and self.rounding_of(weight) != "grid"

    def block_size_of(self, weight: Weight) -> int:
        """Weights that share a scale in one matrix.

        Rows are padded to whole blocks: of the sizes allowed, it is the one with fewest bytes.
        Smaller blocks are slower, larger ones lose more.
        """
        if self.rounding_of(weight) == "grid":
            return GRID_GROUP
        most: int = self._request.block_size
        if self.keeps_codes(weight) and bits(self.dtype_of(weight)) == 2:
            most = min(most, _MOST_OF_2_BITS)
        allowed = [size for size in BLOCK_SIZES if size <= most]
        if weight.codes and self.keeps_codes(weight) and weight.codes.group_size < weight.shape[1]:
            # A block has one scale, so it lies in one group.
            allowed = [size for size in allowed if weight.codes.group_size % size == 0]
        return min(reversed(allowed), key=lambda size: self._block_bytes(weight, size))

    def file_bytes(self, weight: Weight) -> int:
        """Bytes in the data file: of int8 and int4 codes, float32 scales, zero points."""
        dtype = self.dtype_of(weight)
        if dtype not in CODED:
            return packed_bytes(weight.size, dtype)
        if self.is_per_channel(weight):
            return packed_bytes(self._panel_codes(weight), dtype) + 4 * weight.shape[0]
        return self._block_bytes(weight, self.block_size_of(weight))

    def resident_bytes(self, weight: Weight) -> int:
        """Bytes in memory: ONNX Runtime widens some weights when it loads them.

        Those of fp16 become float32, and codes of integer products 8 bits.
        """
        if self.is_per_channel(weight):
            return self._panel_codes(weight) + 4 * weight.shape[0]
        factor = 2 if self.dtype_of(weight) == "fp16" else 1
        return factor * self.file_bytes(weight)

    def row_codes(self, weight: Weight) -> Codes | None:
        """How rows of a matrix are stored; None in numbers, or with zero points of their own."""
        dtype = self.dtype_of(weight)
        if dtype not in CODED or self.has_zero_points(weight) or self.is_per_channel(weight):
            return None
        return Codes(dtype, self.block_size_of(weight), "fp32")

    def notes(self, model: Model) -> list[str]:
        """Of quantized checkpoints, what has more than one scale for an output is rounded."""
        if not self._request.per_channel:
            return []
        coded = [w for w in model.weights if w.codes and self._request.dtype == "source"]
        rounded = [weight for weight in coded if not self.keeps_codes(weight)]
        if not rounded:
            return []
        return [
            f"{len(rounded)} matrices whose codes have several scales for an output are rounded to "
            f"int8 with one, `{rounded[0].name}` first; `--block-size 128` keeps their codes"
        ]

    @staticmethod
    def _panel_codes(weight: Weight) -> int:
        """Codes of a matrix in panels."""
        return align(weight.shape[0], PANEL) * weight.shape[1]

    def _block_bytes(self, weight: Weight, block_size: int) -> int:
        """Bytes of a matrix in blocks of a given size."""
        outputs, inputs = weight.shape
        code_bits, blocks = bits(self.dtype_of(weight)), groups(inputs, block_size)
        zero_points = groups(blocks * code_bits, 8) if self.has_zero_points(weight) else 0
        return outputs * (blocks * (block_size * code_bits // 8 + 4) + zero_points)
