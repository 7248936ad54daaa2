"""The file of a matrix whose rows are looked up too. The specification is docs/blob-format.md."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from pleexport.checked_header import CHECKSUM_BYTES, checked_head
from pleexport.dtypes import packed_bytes
from pleexport.sizes import groups

TIED = "tied.safetensors"
FORMAT = "pleexport-tied"
VERSION = "1"
CODES = "codes"
SCALES = "scales"
CHECKSUMS = "checksums"
PAGE_SIZE = 16_384
_SCALE_BYTES = 4
_NO_DIGEST = "xxh3-128:" + "0" * 32


@dataclass(frozen=True)
class TiedLayout:
    """A matrix `[rows, width]` in codes, as `MatMulNBits` takes it, whose rows are a table's.

    Attributes:
        weight: name of the matrix.
        table: name of the table.
        dtype: of the codes, one of `CODED`.
        group_size: elements that share a scale; rows are padded to whole groups.
        multiplier: float32 factor that a reader applies once to the dequantized values.
    """

    weight: str
    table: str
    rows: int
    width: int
    dtype: str
    group_size: int
    multiplier: float

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return groups(self.width, self.group_size)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a row."""
        return packed_bytes(self.num_groups * self.group_size, self.dtype)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a row."""
        return self.num_groups * _SCALE_BYTES

    @property
    def codes_offset(self) -> int:
        """Byte of the file at which the codes begin."""
        return len(self.head(_NO_DIGEST))

    @property
    def scales_offset(self) -> int:
        """Byte of the file at which the scales begin."""
        return self.codes_offset + self.rows * self.code_bytes

    @property
    def checksums_offset(self) -> int:
        """Byte of the file at which the checksums of rows begin."""
        return self.scales_offset + self.rows * self.scale_bytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.checksums_offset + self.rows * CHECKSUM_BYTES

    def head(self, weights_digest: str) -> bytes:
        """All bytes before the codes.

        Args:
            weights_digest: of the graph that takes the matrix.
        """
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "table": self.table,
            "width": str(self.width),
            "dtype": self.dtype,
            "group_size": str(self.group_size),
            "multiplier": json.dumps(self.multiplier),
            "weights_digest": weights_digest,
        }
        tensors = {
            CODES: ("U8", [self.rows, self.code_bytes]),
            SCALES: ("F32", [self.rows, self.num_groups]),
            CHECKSUMS: ("U64", [self.rows]),
        }
        return checked_head(metadata, tensors, page_size=PAGE_SIZE)


def tied_checksums(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], row_ids: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The XXH3-64 of each row: of its codes, its scales, and its number as a u64.

    Args:
        codes: `[n, code_bytes]`, or any shape whose rows have these bytes.
        scales: `[n, num_groups]`.
    """
    parts = (codes, scales.astype("<f4"), row_ids.astype("<u8"))
    joined = np.concatenate([_as_bytes(part) for part in parts], axis=1)
    rows = (xxhash.xxh3_64_intdigest(row.data) for row in joined)
    return np.fromiter(rows, dtype=np.uint64, count=len(joined))


def _as_bytes(part: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)
