"""Where everything lies in a blob. The specification is docs/blob-format.md."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from pleexport.checked_header import CHECKSUM_BYTES
from pleexport.dtypes import bits, packed_bytes
from pleexport.sizes import groups

FORMAT = "pleexport-blob"
VERSION = "2"
ROWS = "rows"
CHECKSUMS = "checksums"
CHECKSUM_CHUNK_BYTES = 1 << 20
SEGMENT_ALIGNMENT = 4
ROW_ALIGNMENT = 64
MINIMUM_PAGE_SIZE = 16_384

Position = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table's slice of a row.

    Attributes:
        name: unique; `table` or `table.layer`.
        layer: None for a table that belongs to no layer.
        offset: byte in the row at which the codes begin.
        width: elements.
        dtype: one of `COMPUTED` or `CODED`.
        group_size: elements that share a scale; None for floating-point dtypes.
        scale_dtype: "fp16" or "fp32"; None for floating-point dtypes.
        scale_offset: byte in the row at which the scales begin; None likewise.
        multiplier: float32 factor that a reader applies once to the dequantized values.
    """

    name: str
    table: str
    layer: Position | None
    offset: Position
    width: Count
    dtype: str
    group_size: Count | None
    scale_dtype: str | None
    scale_offset: Position | None
    multiplier: float

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return packed_bytes(self.width, self.dtype)

    @property
    def num_groups(self) -> int:
        """Number of scales; 0 for floating-point dtypes."""
        return groups(self.width, self.group_size) if self.group_size else 0

    @property
    def end(self) -> int:
        """First byte of the row behind the segment."""
        if self.scale_offset is None or self.scale_dtype is None:
            return self.offset + self.code_bytes
        return self.scale_offset + scale_bytes(self.scale_dtype) * self.num_groups


def scale_bytes(scale_dtype: str) -> int:
    """Bytes of one scale."""
    return bits(scale_dtype) // 8


def row_checksums(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The XXH3-64 of each row `[n, row_stride]`, which its last 8 bytes should hold."""
    stride = rows.shape[-1]
    data = rows.reshape(-1).data  # slices of it cost half of what an array's do
    bodies = (
        data[begin : begin + stride - CHECKSUM_BYTES] for begin in range(0, len(data), stride)
    )
    return np.array([xxhash.xxh3_64_intdigest(body) for body in bodies], dtype=np.uint64)


def stored_checksums(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """What the last 8 bytes of each row `[n, row_stride]` hold."""
    held: NDArray[np.uint64] = np.ascontiguousarray(rows[:, -CHECKSUM_BYTES:]).view("<u8")[:, 0]
    return held


class ChunkChecksums:
    """The XXH3-64 of each chunk of rows, fed in batches of any size."""

    def __init__(self) -> None:
        self._digests: list[int] = []
        self._hash = xxhash.xxh3_64()
        self._filled = 0

    def update(self, batch: NDArray[np.uint8]) -> None:
        """Take the next rows, `[n, row_stride]`."""
        data = batch.reshape(-1)
        while len(data):
            part = data[: CHECKSUM_CHUNK_BYTES - self._filled]
            self._hash.update(part.data)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == CHECKSUM_CHUNK_BYTES:
                self._close()

    def finish(self) -> NDArray[np.uint64]:
        """The checksums, when all rows have been taken."""
        if self._filled:
            self._close()
        return np.array(self._digests, dtype="<u8")

    def _close(self) -> None:
        self._digests.append(self._hash.intdigest())
        self._hash.reset()
        self._filled = 0
