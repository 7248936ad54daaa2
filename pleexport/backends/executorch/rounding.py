"""Dense weights as codes and scales that XNNPACK takes: rounded, or a checkpoint's own."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pleexport.codes import QuantizedRows
from pleexport.quantize import best_scales, grouped_importance, grouped_values, round_to_codes

# Values that are worked on at once: few enough to stay in a core's cache.
_CHUNK_VALUES = 1 << 17
# XNNPACK refuses scales that are zero or not normal numbers, when a program is loaded.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Codes:
    """A matrix `[N, K]`: value = code * scale.

    Attributes:
        codes: `[N, K]` int8, -8 to 7 for 4 bits.
        scales: `[N, K / group]` float32, above zero; those of groups exact in bfloat16.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]


def own_codes(own: QuantizedRows, *, scale_dtype: str) -> Codes:
    """A checkpoint's codes `[n, 1, K]` and scales, which nothing rounds.

    Codes whose scale is 0 stand for zeros, and are stored as these.

    Args:
        scale_dtype: what scales are stored in, "fp32" or "bf16".
    Raises:
        ValueError: XNNPACK does not take a scale, or `scale_dtype` does not hold it.
    """
    codes, scales = own.codes[:, 0], own.scales[:, 0].astype(np.float32)
    if not scales.all():
        zero = np.repeat(scales == 0, codes.shape[1] // scales.shape[1], axis=1)
        codes = np.where(zero, np.int8(0), codes)
        scales = np.where(scales == 0, np.float32(1), scales)
    if not (np.isfinite(scales) & (scales >= np.finfo(np.float32).tiny)).all():
        raise ValueError("a scale is negative, or no normal number")
    if scale_dtype == "bf16" and (scales.astype(ml_dtypes.bfloat16) != scales).any():
        raise ValueError("XNNPACK has bfloat16 scales for groups, which do not hold its own")
    return Codes(codes, scales)


def round_matrix(
    weight_NK: NDArray[np.float32],
    *,
    bits: int,
    group: int,
    importance: NDArray[np.float32] | None = None,
) -> Codes:
    """Round a matrix with one scale for each `group` weights along its inputs.

    Args:
        group: divides K.
        importance: `[K]`, how much a squared error in each input's weights counts; all alike by
            default.
    Raises:
        ValueError: a value is not finite, or too large for its scale.
    """
    if not np.isfinite(weight_NK).all():
        raise ValueError("values are not finite")
    outputs, inputs = weight_NK.shape
    lowest, highest = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    codes = np.empty((outputs, inputs), dtype=np.int8)
    scales = np.empty((outputs, inputs // group), dtype=np.float32)
    weighted = None if importance is None else grouped_importance(importance, group)
    step = max(1, _CHUNK_VALUES // inputs)
    for begin in range(0, outputs, step):
        rows = slice(begin, begin + step)
        values = grouped_values(weight_NK[rows], group)
        # One sign for all scales: a negative one would use the lowest code better, and XNNPACK
        # refuses it.
        widest = np.maximum(values.max(-1) / highest, values.min(-1) / lowest)
        widest = np.maximum(widest, SMALLEST_SCALE).astype(np.float32)
        found = best_scales(values, widest, lowest, highest, bits=bits, importance=weighted)
        found = np.where(found > SMALLEST_SCALE, found, widest)
        if bits == 4:
            # Before codes are chosen: they are then right for the scale that is stored.
            found = found.astype(ml_dtypes.bfloat16).astype(np.float32)
        if not np.isfinite(found).all():
            raise ValueError("values are too large for their scales")
        scales[rows] = found
        rounded = round_to_codes(values, found, lowest, highest)
        codes[rows] = rounded.reshape(-1, inputs)
    return Codes(codes, scales)
