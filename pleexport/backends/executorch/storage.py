"""How weights are stored in a `.pte`, and how many bytes that takes. Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from pleexport.dtypes import packed_bytes
from pleexport.model import Model, Weight
from pleexport.quantize import GRID_GROUP
from pleexport.weights import WeightRequest

# XNNPACK's kernels take groups of this many weights, or of a multiple.
GROUP_STEP = 32


class ExecutorchStorage:
    """Matrices as XNNPACK takes them, everything else in float32.

    int8 has one float32 scale for each output. int4 has groups along the inputs with a bfloat16
    scale each; they are as large as the request and the number of inputs allow. A matrix whose
    number of inputs has no such group is stored in int8.

    A grid that matrices were trained for has scales of either sign, and XNNPACK takes positive ones
    only. So they are rounded anew, in groups of the grid's size, and what keeps 8 bits keeps them.
    """

    def __init__(self, request: WeightRequest) -> None:
        self._request = replace(request, trained_grid=False)
        self._on_grid = request.on_grid

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

    def notes(self, model: Model) -> list[str]:
        """The matrices that cannot be stored as asked for, or as they were trained."""
        return [*self._notes_on_grids(model), *self._notes_on_widened(model)]

    def _notes_on_grids(self, model: Model) -> list[str]:
        grid = [w for w in model.weights if self._on_grid(w) and self.dtype_of(w) == "int4"]
        if not grid:
            return []
        return [
            f"{len(grid)} of the matrices on a grid are rounded anew, in groups of {GRID_GROUP}: "
            "the grid has scales of either sign, and XNNPACK takes positive ones only"
        ]

    def _notes_on_widened(self, model: Model) -> list[str]:
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
        inputs = weight.shape[1]
        most = GRID_GROUP if self._on_grid(weight) else self._request.block_size
        allowed = range(most // GROUP_STEP * GROUP_STEP, 0, -GROUP_STEP)
        return next((size for size in allowed if inputs % size == 0), 0)
