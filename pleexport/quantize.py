"""Pure quantizers: float32 arrays in, codes and scales out.

Symmetric, in groups along the last axis: value = code * scale, with codes in [-127, 127] (int8) or
[-7, 7] (int4). A scale is rounded up to its stored dtype before codes are computed, so no value is
clipped and each is within half a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_CODE = {8: 127, 4: 7}


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
    divisors = np.where(scales == 0, np.float16(1), scales).astype(np.float32)
    codes = np.rint(values / np.repeat(divisors, group_size, axis=-1)[..., :width])
    return codes.astype(np.int8), scales


def group_scales(values: NDArray[np.float32], *, bits: int, group_size: int) -> NDArray[np.float16]:
    """The scale of each group of `[..., W]`: the step between neighbouring codes."""
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
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.int8)
    codes[..., 0::2] = packed & 0x0F
    codes[..., 1::2] = packed >> 4
    codes -= 8
    return codes[..., :width]


def quantize_blocks(
    weight_NK: NDArray[np.float32], *, bits: int, block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize a matrix for ONNX Runtime's `MatMulNBits`.

    Args:
        weight_NK: `[N, K]`, N outputs.
    Returns:
        codes `[N, blocks, block_size * bits / 8]` with the zero point 2**(bits - 1), the first code
        in the low bits, and scales `[N, blocks]`.
    Raises:
        ValueError: a value is not finite.
    Source: onnxruntime docs/ContribOperators.md, `com.microsoft.MatMulNBits`.
    """
    if not np.isfinite(weight_NK).all():
        raise ValueError("values are not finite")
    outputs, inputs = weight_NK.shape
    blocks = groups(inputs, block_size)
    padded = np.zeros((outputs, blocks * block_size), dtype=np.float32)
    padded[:, :inputs] = weight_NK
    grouped = padded.reshape(outputs, blocks, block_size)
    # The largest value by magnitude maps to the lowest code, so that all 2**bits codes are used.
    at = np.abs(grouped).argmax(axis=-1)[..., None]
    zero_point = 1 << (bits - 1)
    scales = np.take_along_axis(grouped, at, axis=-1)[..., 0] / np.float32(-zero_point)
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.rint(grouped / divisors)
    np.clip(codes, -zero_point, zero_point - 1, out=codes)
    unsigned = (codes + zero_point).astype(np.uint8)
    if bits == 4:
        unsigned = _join_nibbles(unsigned)
    return unsigned, scales


def _join_nibbles(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8)
