"""How weights are stored in a `.pte`, and how many bytes that takes. Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from pleexport.dtypes import QUANTIZED, packed_bytes
from pleexport.model import Codes, Model, Weight
from pleexport.quantize import GRID_GROUP
from pleexport.sizes import size_text
from pleexport.weights import WeightRequest

# XNNPACK's kernels take groups of this many weights, or of a multiple.
GROUP_STEP = 32


class ExecutorchStorage:
    """Matrices as XNNPACK takes them, everything else in float32.

    int8 has one float32 scale for each output. int4 has groups along the inputs with a bfloat16
    scale each; they are as large as the request and the number of inputs allow. A matrix whose
    number of inputs has no such group is stored in int8.

    A checkpoint's own codes keep its scales: one float32 scale for each output, or groups whose
    scales bfloat16 holds. Codes of 2 bits are stored in 4, which hold them too, and so are codes of
    fewer than 8 bits in 8 where a row would not be whole bytes.

    A grid that matrices were trained for has scales of either sign, and XNNPACK takes positive ones
    only. So they are rounded anew, in groups of the grid's size, and what keeps 8 bits keeps them.
    """

    def __init__(self, request: WeightRequest) -> None:
        self._request = replace(request, trained_grid=False)
        self._on_grid = request.on_grid

    def keeps_codes(self, weight: Weight) -> bool:
        """Whether a weight is stored with the checkpoint's own codes."""
        return self._request.keeps_codes(weight)

    def dtype_of(self, weight: Weight) -> str:
        """The dtype that one weight is stored in."""
        dtype = self._request.dtype_of(weight)
        if self.keeps_codes(weight):
            dtype = "int4" if dtype == "int2" else dtype
            return "int8" if weight.shape[1] % 2 else dtype
        return "int8" if dtype == "int4" and not self._group(weight) else dtype

    def group_of(self, weight: Weight) -> int:
        """Weights that share a scale in a matrix of int4 or int8."""
        if self.keeps_codes(weight):
            assert weight.codes is not None
            return weight.codes.group_size
        return self._group(weight) if self.dtype_of(weight) == "int4" else weight.shape[1]

    def scale_dtype_of(self, weight: Weight) -> str:
        """The dtype of a matrix's scales: groups have bfloat16 ones."""
        if self.keeps_codes(weight) and self.group_of(weight) == weight.shape[1]:
            return "fp32"
        return "bf16" if self.dtype_of(weight) == "int4" else "fp32"

    def file_bytes(self, weight: Weight) -> int:
        """Bytes of codes and scales."""
        dtype = self.dtype_of(weight)
        codes = packed_bytes(weight.size, dtype)
        if dtype not in QUANTIZED:
            return codes
        scales = weight.size // self.group_of(weight)
        return codes + packed_bytes(scales, self.scale_dtype_of(weight))

    def resident_bytes(self, weight: Weight) -> int:
        """Bytes in memory: XNNPACK arranges weights anew, and keeps a sum for each output."""
        sums = 4 * weight.shape[0] if self.dtype_of(weight) in QUANTIZED else 0
        return self.file_bytes(weight) + sums

    def row_codes(self, weight: Weight) -> Codes | None:
        """None: a program holds its weights itself, and XNNPACK's copies have no rows."""
        return None

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
        """The matrices that are stored in more bits than was asked for, and why."""
        wide = [w for w in model.weights if self.dtype_of(w) != self._request.dtype_of(w)]
        own = [w for w in wide if self.keeps_codes(w)]
        notes = []
        for dtype in ("int2", "int4"):
            if kept := [w for w in own if self._request.dtype_of(w) == dtype]:
                more = sum(self.file_bytes(w) - packed_bytes(w.size, dtype) for w in kept)
                notes.append(
                    f"{len(kept)} matrices of {dtype} codes are stored in more bits, "
                    f"`{kept[0].name}` first: ExecuTorch hands XNNPACK codes of 4 and 8 bits, and "
                    f"rows of whole bytes; the values are the same, and take {size_text(more)} more"
                )
        if rounded := [w for w in wide if not self.keeps_codes(w)]:
            first, inputs = rounded[0].name, rounded[0].shape[1]
            notes.append(
                f"{len(rounded)} matrices are stored in int8, `{first}` first: XNNPACK takes int4 "
                f"in groups of {GROUP_STEP} weights or a multiple up to "
                f"{self._request.block_size}, and none divides {inputs} inputs"
            )
        return notes

    def _group(self, weight: Weight) -> int:
        """The largest group of int4 codes that a matrix can have; 0 for none."""
        inputs = weight.shape[1]
        most = GRID_GROUP if self._on_grid(weight) else self._request.block_size
        allowed = range(most // GROUP_STEP * GROUP_STEP, 0, -GROUP_STEP)
        return next((size for size in allowed if inputs % size == 0), 0)


def refusal_of_codes(weight: Weight) -> str | None:
    """Why a checkpoint's own codes cannot be stored as they are; None where they can."""
    codes, inputs = weight.codes, weight.shape[1]
    if codes is not None and codes.zero_points:
        return (
            f"matrix `{weight.name}` has codes with zero points; XNNPACK takes codes around 0 only"
        )
    if codes is None or codes.group_size == inputs:
        return None
    if codes.dtype == "int8" or codes.group_size % GROUP_STEP or inputs % codes.group_size:
        return (
            f"matrix `{weight.name}` has {codes.dtype} codes with a scale for every "
            f"{codes.group_size} of {inputs} inputs; XNNPACK takes one for each output, and for "
            f"groups of {GROUP_STEP} inputs or a multiple in codes of up to 4 bits"
        )
    return None
