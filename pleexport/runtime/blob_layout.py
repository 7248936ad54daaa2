"""Where everything lies in a blob. The specification is docs/blob-format.md."""

from __future__ import annotations

import msgspec

from pleexport.dtypes import packed_bytes
from pleexport.sizes import groups

FORMAT = "pleexport-blob"
VERSION = "1"
ROWS = "rows"
CHECKSUMS = "checksums"
CHECKSUM_CHUNK_BYTES = 1 << 20
SEGMENT_ALIGNMENT = 16
ROW_ALIGNMENT = 64
MINIMUM_PAGE_SIZE = 16_384

SCALE_DTYPE = "fp16"


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table's slice of a row.

    Attributes:
        name: unique; `table` or `table.layer`.
        layer: None for a table that belongs to no layer.
        offset: byte in the row at which the codes begin.
        width: elements.
        dtype: one of `TABLE_DTYPES` but "source".
        group_size: elements that share a scale; None for floating-point dtypes.
        scale_dtype: "fp16"; None for floating-point dtypes.
        scale_offset: byte in the row at which the scales begin; None likewise.
        multiplier: float32 factor that a reader applies once to the dequantized values.
    """

    name: str
    table: str
    layer: int | None
    offset: int
    width: int
    dtype: str
    group_size: int | None = None
    scale_dtype: str | None = None
    scale_offset: int | None = None
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
        if self.scale_offset is None:
            return self.offset + self.code_bytes
        return self.scale_offset + 2 * self.num_groups
