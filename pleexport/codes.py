"""Codes and scales of rows, as docs/blob-format.md stores them, and the values they stand for.

value = (code - zero point) * scale, with signed codes of 8, 4 or 2 bits, and a scale for each group
along the last axis. Rows of a blob have no zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scales = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a table or a matrix as a quantized checkpoint holds them.

    Attributes:
        codes: `[n, segments, W]`.
        scales: `[n, segments, groups]`.
        zero_points: the codes that stand for 0, like scales; None where all are 0.
    """

    codes: NDArray[np.int8]
    scales: Scales
    zero_points: NDArray[np.int8] | None = None

    def values(self, group_size: int) -> NDArray[np.float32]:
        """What the codes stand for, `[n, segments, W]`: one product in float32."""
        return dequantize_rows(
            self.codes, self.scales, group_size=group_size, zero_points=self.zero_points
        )


def dequantize_rows(
    codes: NDArray[np.int8],
    scales: Scales,
    *,
    group_size: int,
    zero_points: NDArray[np.int8] | None = None,
) -> NDArray[np.float32]:
    """The values that codes `[..., W]`, scales and zero points `[..., groups]` stand for."""
    width = codes.shape[-1]
    values = codes.astype(np.float32)
    if width % group_size == 0:
        grouped = values.reshape(*values.shape[:-1], -1, group_size)
        if zero_points is not None:
            grouped -= zero_points.astype(np.float32)[..., None]
        grouped *= scales.astype(np.float32)[..., None]
        return values
    if zero_points is not None:
        values -= np.repeat(zero_points.astype(np.float32), group_size, axis=-1)[..., :width]
    values *= np.repeat(scales.astype(np.float32), group_size, axis=-1)[..., :width]
    return values


def pack_codes(codes: NDArray[np.int8], *, bits: int) -> NDArray[np.uint8]:
    """Signed codes `[..., W]` as bytes, the first in the lowest bits.

    Codes of 8 bits stay as they are; others are stored plus 2**(bits - 1), and zeros fill up the
    last byte.
    """
    if bits == 8:
        return codes.view(np.uint8)
    missing = -codes.shape[-1] % (8 // bits)
    if missing:
        zeros = np.zeros((*codes.shape[:-1], missing), dtype=np.int8)
        codes = np.concatenate((codes, zeros), axis=-1)
    return join_codes((codes + np.int8(2 ** (bits - 1))).view(np.uint8), bits=bits)


def unpack_codes(packed: NDArray[np.uint8], *, bits: int, width: int) -> NDArray[np.int8]:
    """The `width` codes that `pack_codes` packed."""
    if bits == 8:
        return packed.view(np.int8)[..., :width]
    return _CODES_OF_A_BYTE[bits].take(packed).view(np.int8)[..., :width]


def join_codes(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint8]:
    """Unsigned codes of 4 or 2 bits as bytes, the first in the lowest bits."""
    joined = codes[..., :: 8 // bits].copy()
    for place in range(1, 8 // bits):
        joined |= codes[..., place :: 8 // bits] << np.uint8(place * bits)
    return joined


def _codes_of_a_byte(bits: int) -> NDArray[np.unsignedinteger]:
    """For each byte, the codes in it side by side: a word that one `take` copies.

    Taking shifts and masks apart costs twice as much.
    """
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (2**bits - 1)
    signed = (codes - 2 ** (bits - 1)).astype(np.int8)
    words: NDArray[np.unsignedinteger] = signed.view(f"u{8 // bits}")[:, 0]
    return words


_CODES_OF_A_BYTE = {bits: _codes_of_a_byte(bits) for bits in (4, 2)}
