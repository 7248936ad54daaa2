"""Where everything lies in a blob. The specification is docs/blob-format.md."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import msgspec
import numpy as np

from pleexport.model import Table
from pleexport.quantize import groups

FORMAT = "pleexport-blob"
VERSION = "1"
ROWS = "rows"
CHECKSUMS = "checksums"
CHECKSUM_CHUNK_BYTES = 1 << 20
SEGMENT_ALIGNMENT = 16
ROW_ALIGNMENT = 64
MINIMUM_PAGE_SIZE = 16_384

ITEM_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
FLOAT_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SAFETENSORS_TO_SEGMENT = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
GROUP_SIZES = {"int8": 128, "int4": 32}
TABLE_DTYPES = ("source", *ITEM_BITS)


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table's slice of a row.

    Attributes:
        name: unique; `table` or `table.layer`.
        layer: None for a table that belongs to no layer.
        offset: byte in the row at which the codes begin.
        width: elements.
        dtype: one of `ITEM_BITS`.
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
        return -(-self.width * ITEM_BITS[self.dtype] // 8)

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


def align(position: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not below `position`."""
    return -(-position // alignment) * alignment


def segment_dtype(table_dtype: str, source: str) -> str:
    """The segment dtype that a build's `table_dtype` means for a checkpoint of dtype `source`."""
    return SAFETENSORS_TO_SEGMENT[source] if table_dtype == "source" else table_dtype


def plan_segments(tables: Iterable[Table], table_dtype: str, source: str) -> list[Segment]:
    """Lay out the segments of a row: tables in order, layer after layer.

    Args:
        table_dtype: what a build asks for.
        source: the checkpoint's dtype.
    """
    segments: list[Segment] = []
    position = 0
    for table in tables:
        dtype = segment_dtype(table_dtype, table.source_dtype(source))
        for layer in range(table.layers or 1):
            group_size = min(GROUP_SIZES[dtype], table.width) if dtype in GROUP_SIZES else None
            segment = Segment(
                name=table.name if table.layers is None else f"{table.name}.{layer}",
                table=table.name,
                layer=None if table.layers is None else layer,
                offset=position,
                width=table.width,
                dtype=dtype,
                group_size=group_size,
                scale_dtype="fp16" if group_size else None,
                scale_offset=align(position + -(-table.width * ITEM_BITS[dtype] // 8), 2)
                if group_size
                else None,
                multiplier=table.multiplier,
            )
            segments.append(segment)
            position = align(segment.end, SEGMENT_ALIGNMENT)
    return segments


def row_stride(segments: list[Segment]) -> int:
    """Bytes from one row to the next."""
    return align(max(segment.end for segment in segments), ROW_ALIGNMENT)
