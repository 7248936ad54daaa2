"""Codes and scales of rows, as docs/blob-format.md stores them, and the values they stand for.

value = code * scale, with codes in [-127, 127] (int8) or [-7, 7] (int4), and a scale for each group
along the last axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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


def pack_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two int4 codes a byte, each plus 8, the first in the low nibble; an odd end is padded."""
    nibbles = (codes + 8).astype(np.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate((nibbles, np.full_like(nibbles[..., :1], 8)), axis=-1)
    return join_nibbles(nibbles)


def unpack_nibbles(packed: NDArray[np.uint8], *, width: int) -> NDArray[np.int8]:
    """The `width` codes that `pack_nibbles` packed."""
    return (_split_nibbles(packed).view(np.int8) - np.int8(8))[..., :width]


def join_nibbles(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pairs along the last axis as bytes, the first in the low nibble."""
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8)


def _split_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    nibbles = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    nibbles[..., 0::2] = packed & 0x0F
    nibbles[..., 1::2] = packed >> 4
    return nibbles
