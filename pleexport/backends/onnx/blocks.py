"""Round dense weights to what ONNX Runtime's `MatMulNBits` takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.codes import QuantizedRows, join_codes
from pleexport.dtypes import bits as bits_of
from pleexport.model import Codes
from pleexport.quantize import (
    SMALLEST,
    Rounding,
    best_scales,
    grid_scales,
    grouped_importance,
    grouped_values,
    round_to_codes,
)
from pleexport.sizes import groups

# Values that are worked on at once: few enough to stay in a core's cache.
_CHUNK_VALUES = 1 << 17


@dataclass(frozen=True)
class Blocks:
    """A matrix `[N, K]` as `MatMulNBits` takes it: value = (code - zero point) * scale.

    Attributes:
        codes: `[N, blocks, block_size * bits / 8]` uint8, the first code in the low bits.
        scales: `[N, blocks]` float32.
        zero_points: `[N, ceil(blocks * bits / 8)]` uint8, the first in the low bits; None where all
            are 2**(bits - 1).
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def quantize_blocks(
    weight_NK: NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    symmetric: bool = True,
    importance: NDArray[np.float32] | None = None,
    rounding: Rounding = "searched",
) -> Blocks:
    """Quantize a matrix for ONNX Runtime's `MatMulNBits`.

    Args:
        weight_NK: `[N, K]`, N outputs.
        symmetric: one zero point for all blocks, 2**(bits - 1); otherwise each has its own.
        importance: `[K]`, how much a squared error in each input's weights counts; all alike by
            default.
        rounding: "grid" for a symmetric matrix of 4 bits that was trained for these blocks.
    Raises:
        ValueError: a value is not finite.
    Source: onnxruntime docs/ContribOperators.md, `com.microsoft.MatMulNBits`.
    """
    if not np.isfinite(weight_NK).all():
        raise ValueError("values are not finite")
    outputs, inputs = weight_NK.shape
    blocks = groups(inputs, block_size)
    codes = np.empty((outputs, blocks, block_size), dtype=np.uint8)
    scales = np.empty((outputs, blocks), dtype=np.float32)
    zero_points = np.empty((outputs, blocks), dtype=np.uint8)
    step = max(1, _CHUNK_VALUES // (blocks * block_size))
    weighted = None if importance is None else grouped_importance(importance, block_size)
    for begin in range(0, outputs, step):
        rows = slice(begin, begin + step)
        grouped = grouped_values(weight_NK[rows], block_size)
        widest, zero_points[rows] = _widest(grouped, bits=bits, symmetric=symmetric)
        zero = zero_points[rows].astype(np.float32)[..., None]
        lowest, highest = -zero, np.float32(2**bits - 1) - zero
        scales[rows] = (
            grid_scales(grouped)
            if rounding == "grid"
            else best_scales(grouped, widest, lowest, highest, bits=bits, importance=weighted)
        )
        rounded = round_to_codes(grouped, scales[rows], lowest, highest)
        codes[rows] = np.add(rounded, zero, out=rounded)
    if bits == 4:
        codes = join_codes(codes, bits=4)
    return Blocks(codes, scales, None if symmetric else _pack_zero_points(zero_points, bits))


def _widest(
    grouped: NDArray[np.float32], *, bits: int, symmetric: bool
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The scales that clip nothing, and the zero points, of `[N, blocks, G]`."""
    top, bottom = grouped.max(axis=-1), grouped.min(axis=-1)
    if symmetric:
        # The largest value by magnitude gets the lowest code, so that all 2**bits codes are used.
        middle = 1 << (bits - 1)
        scales = np.where(top > -bottom, top, bottom) / np.float32(-middle)
        return scales, np.full(scales.shape, middle, dtype=np.uint8)
    scales = (np.maximum(top, 0) - np.minimum(bottom, 0)) / np.float32(2**bits - 1)
    zero_points = np.rint(-np.minimum(bottom, 0) / np.where(scales > SMALLEST, scales, 1))
    return scales, zero_points.astype(np.uint8)


def _pack_zero_points(zero_points: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return zero_points
    missing = -zero_points.shape[-1] % (8 // bits)
    if missing:
        zero_points = np.pad(zero_points, ((0, 0), (0, missing)))
    return join_codes(zero_points, bits=bits)


def blocks_of_codes(rows: QuantizedRows, how: Codes, *, block_size: int) -> Blocks:
    """A checkpoint's own codes and scales; nothing is rounded.

    A scale is repeated for each block of its group, and what fills up the last block stands for 0.

    Args:
        rows: `[N, 1, K]`.
    """
    outputs, _, inputs = rows.codes.shape
    code_bits, blocks = bits_of(how.dtype), groups(inputs, block_size)
    of_block = np.arange(blocks) * block_size // how.group_size
    zero_points = np.full((outputs, blocks), 1 << (code_bits - 1), dtype=np.uint8)
    if rows.zero_points is not None:
        zero_points = _unsigned(rows.zero_points[:, 0, of_block], code_bits)
    padded = np.repeat(zero_points[:, -1:], blocks * block_size, axis=1)
    padded[:, :inputs] = _unsigned(rows.codes[:, 0], code_bits)
    codes = padded.reshape(outputs, blocks, block_size)
    if code_bits < 8:
        codes = join_codes(codes, bits=code_bits)
    scales = np.ascontiguousarray(rows.scales[:, 0, of_block], dtype=np.float32)
    packed = None if rows.zero_points is None else _pack_zero_points(zero_points, code_bits)
    return Blocks(codes, scales, packed)


def _unsigned(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Signed codes plus 2**(bits - 1)."""
    return (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
