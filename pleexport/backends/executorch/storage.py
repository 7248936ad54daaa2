"""How weights are stored in a `.pte`, and how many bytes that takes. Needs no torch."""

from __future__ import annotations

from pleexport.dtypes import packed_bytes
from pleexport.model import Codes, Model, Weight
from pleexport.weights import WeightRequest

# XNNPACK's kernels take groups of this many weights, or of a multiple.
GROUP_STEP = 32


class ExecutorchStorage:
    """Matrices as XNNPACK takes them, everything else in float32.

    int8 has one float32 scale for each output. int4 has groups along the inputs with a bfloat16
    scale each; they are as large as the request and the number of inputs allow. A matrix whose
    number of inputs has no such group is stored in int8.
    """

    def __init__(self, request: WeightRequest) -> None:
        self._request = request

    def dtype_of(self, weight: Weight) -> str:
        """The dtype that one weight is stored in."""
        dtype = self._request.dtype_of(weight)
        return "int8" if dtype == "int4" and not self._group(weight) else dtype

    def group_of(self, weight: Weight) -> int:
        """Weights that share a scale in a matrix of int4 or int8."""
        return self._group(weight) if self.dtype_of(weight) == "int4" else weight.shape[1]

    def file_bytes(self, weight: Weight) -> int:
        """Bytes of codes and scales."""
        dtype = self.dtype_of(weight)
        codes = packed_bytes(weight.size, dtype)
        if dtype == "int4":
            return codes + 2 * (weight.size // self.group_of(weight))
        return codes + (4 * weight.shape[0] if dtype == "int8" else 0)

    def resident_bytes(self, weight: Weight) -> int:
        """Bytes in memory: XNNPACK arranges weights anew, and keeps a sum for each output."""
        dtype = self.dtype_of(weight)
        sums = 4 * weight.shape[0] if dtype in ("int8", "int4") else 0
        return self.file_bytes(weight) + sums

    def row_codes(self, weight: Weight) -> Codes | None:
        """None: a program holds its weights itself, and XNNPACK's copies have no rows."""
        return None

    def notes(self, model: Model) -> list[str]:
        """The matrices that are stored in int8 for want of a group."""
        wide = [w for w in model.weights if self.dtype_of(w) != self._request.dtype_of(w)]
        if not wide:
            return []
        first, inputs = wide[0].name, wide[0].shape[1]
        return [
            f"{len(wide)} matrices are stored in int8, `{first}` first: XNNPACK takes int4 in "
            f"groups of {GROUP_STEP} weights or a multiple up to {self._request.block_size}, and "
            f"none divides {inputs} inputs"
        ]

    def _group(self, weight: Weight) -> int:
        """The largest group of int4 codes that a matrix can have; 0 for none."""
        inputs, most = weight.shape[1], self._request.block_size
        allowed = range(most // GROUP_STEP * GROUP_STEP, 0, -GROUP_STEP)
        return next((size for size in allowed if inputs % size == 0), 0)
