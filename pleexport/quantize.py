"""Pure quantizers: float32 arrays in, codes and scales out.

Rows of tables are symmetric, in groups along the last axis: value = code * scale, with codes in
[-127, 127] (int8) or [-7, 7] (int4). An int8 scale is rounded up to its stored dtype before codes
are computed, so no value is clipped and each is within half a step. With 4 bits the scale is
searched for the least squared error of its group, which clips the largest values of some groups.

Blocks of dense weights follow ONNX Runtime's `MatMulNBits`; their scales are searched likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CODE = {8: 127, 4: 7}
# By bits, shares of the scale that clips nothing. A few are enough, since the best scale for the
# codes that each leads to is computed, not searched; with 8 bits clipping never pays.
SHRINKS = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.79, 0.72)}
# Values that are worked on at once: few enough to stay in a core's cache.
_CHUNK_VALUES = 1 << 17
_SMALLEST = float(np.finfo(np.float32).tiny)


def groups(width: int, group_size: int) -> int:
    """How many groups cover `width` elements; the last may be shorter."""
    return -(-width // group_size)


def quantize_rows(
    values: NDArray[np.float32], *, bits: int, group_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantize `[..., W]` to codes `[..., W]` and scales `[..., groups]`.

    Raises:
        ValueError: a value is not finite, or too large for a float16 scale.
    """
    width = values.shape[-1]
    scales = group_scales(values, bits=bits, group_size=group_size)
    if not np.isfinite(scales).all():
        raise ValueError("values are not finite, or exceed the range of float16 scales")
    grouped, limit = _grouped(values, group_size), float(MAX_CODE[bits])
    if bits == 4:
        found = best_scales(grouped, scales.astype(np.float32), -limit, limit, bits=bits)
        with np.errstate(under="ignore"):
            narrowed = np.minimum(found.astype(np.float16), scales)
        scales = np.where(narrowed > 0, narrowed, scales)
    codes = _round_to_codes(grouped, scales.astype(np.float32), -limit, limit)
    codes = codes.reshape(*values.shape[:-1], -1)[..., :width]
    return codes.astype(np.int8), scales


def group_scales(values: NDArray[np.float32], *, bits: int, group_size: int) -> NDArray[np.float16]:
    """The scale of each group of `[..., W]` that clips nothing: the step between two codes."""
    starts = np.arange(0, values.shape[-1], group_size)
    largest = np.maximum.reduceat(np.abs(values), starts, axis=-1)
    # In float64: a float32 quotient of the smallest numbers would underflow to a scale of zero.
    return round_up_to_float16(largest.astype(np.float64) / MAX_CODE[bits])


def dequantize_rows(
    codes: NDArray[np.int8], scales: NDArray[np.float16], *, group_size: int
) -> NDArray[np.float32]:
    """The values that codes `[..., W]` and scales `[..., groups]` stand for."""
    width = codes.shape[-1]
    values = codes.astype(np.float32)
    if width % group_size == 0:
        grouped = values.reshape(*values.shape[:-1], -1, group_size)
        grouped *= scales.astype(np.float32)[..., None]
        return values
    values *= np.repeat(scales.astype(np.float32), group_size, axis=-1)[..., :width]
    return values


def round_up_to_float16(values: NDArray[np.float64]) -> NDArray[np.float16]:
    """The smallest float16 numbers that are not below `values` (>= 0)."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16)
    low = rounded < values
    return np.where(low, np.nextafter(rounded, np.float16(np.inf)), rounded)


def pack_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two int4 codes a byte, each plus 8, the first in the low nibble; an odd end is padded."""
    nibbles = (codes + 8).astype(np.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate((nibbles, np.full_like(nibbles[..., :1], 8)), axis=-1)
    return _join_nibbles(nibbles)


def unpack_nibbles(packed: NDArray[np.uint8], *, width: int) -> NDArray[np.int8]:
    """The `width` codes that `pack_nibbles` packed."""
    return (_split_nibbles(packed).view(np.int8) - np.int8(8))[..., :width]


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
) -> Blocks:
    """Quantize a matrix for ONNX Runtime's `MatMulNBits`, scales searched.

    Args:
        weight_NK: `[N, K]`, N outputs.
        symmetric: one zero point for all blocks, 2**(bits - 1); otherwise each has its own.
        importance: `[K]`, how much a squared error in each input's weights counts; all alike by
            default.
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
    importance_groups = None
    if importance is not None:
        # Relative, so that nothing underflows; inputs that a text never moved still count a little.
        relative = importance / max(float(importance.mean()), _SMALLEST) + 1e-4
        importance_groups = _grouped(relative.astype(np.float32), block_size)
    for begin in range(0, outputs, step):
        rows = slice(begin, begin + step)
        grouped = _grouped(weight_NK[rows], block_size)
        widest, zero_points[rows] = _widest(grouped, bits=bits, symmetric=symmetric)
        zero = zero_points[rows].astype(np.float32)[..., None]
        lowest, highest = -zero, np.float32(2**bits - 1) - zero
        scales[rows] = best_scales(
            grouped, widest, lowest, highest, bits=bits, importance=importance_groups
        )
        rounded = _round_to_codes(grouped, scales[rows], lowest, highest)
        codes[rows] = np.add(rounded, zero, out=rounded)
    if bits == 4:
        codes = _join_nibbles(codes)
    return Blocks(codes, scales, None if symmetric else _pack_zero_points(zero_points, bits))


def best_scales(
    values: NDArray[np.float32],
    widest: NDArray[np.float32],
    lowest: NDArray[np.float32] | float,
    highest: NDArray[np.float32] | float,
    *,
    bits: int,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """For each group of `[..., groups, G]`, the scale of least squared error among a few.

    For the codes c that a scale leads to, the best scale has a closed form, sum(x c) / sum(c c),
    and takes sum(x c)**2 / sum(c c) off the squared error. All sums are weighted by importance.

    Args:
        widest: `[..., groups]`, the scales that clip nothing.
        lowest, highest: the range of codes, zero point taken off; broadcast over groups.
        importance: `[groups, G]`, above zero; all alike by default.
    """
    best_gain = np.full(widest.shape, -1, dtype=np.float32)
    best = np.zeros(widest.shape, dtype=np.float32)
    codes = np.empty_like(values)
    weighted = values if importance is None else values * importance
    for shrink in SHRINKS[bits]:
        _round_to_codes(values, widest * np.float32(shrink), lowest, highest, out=codes)
        product = np.einsum("...g,...g->...", weighted, codes)
        counted = codes if importance is None else codes * importance
        square = np.maximum(np.einsum("...g,...g->...", counted, codes), np.float32(_SMALLEST))
        gain = product * product / square
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best, product / square, where=better)
    return best


def _round_to_codes(
    values: NDArray[np.float32],
    scales: NDArray[np.float32],
    lowest: NDArray[np.float32] | float,
    highest: NDArray[np.float32] | float,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The nearest codes of `[..., groups, G]`; a scale too small to divide by gives zeros."""
    usable = np.abs(scales) > _SMALLEST
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    out = np.multiply(values, inverse[..., None], out=out)
    np.rint(out, out=out)
    np.clip(out, lowest, highest, out=out)
    return out


def _grouped(values: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """`[..., W]` as `[..., groups, group_size]`, padded with zeros."""
    width = values.shape[-1]
    count = groups(width, group_size)
    if width % group_size:
        padded = np.zeros((*values.shape[:-1], count * group_size), dtype=np.float32)
        padded[..., :width] = values
        values = padded
    return values.reshape(*values.shape[:-1], count, group_size)


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
    zero_points = np.rint(-np.minimum(bottom, 0) / np.where(scales > _SMALLEST, scales, 1))
    return scales, zero_points.astype(np.uint8)


def _pack_zero_points(zero_points: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return zero_points
    if zero_points.shape[-1] % 2:
        zero_points = np.concatenate((zero_points, np.zeros_like(zero_points[:, :1])), axis=-1)
    return _join_nibbles(zero_points)


def _join_nibbles(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8)


def _split_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    nibbles = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    nibbles[..., 0::2] = packed & 0x0F
    nibbles[..., 1::2] = packed >> 4
    return nibbles
