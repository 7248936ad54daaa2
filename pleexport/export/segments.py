"""Lay out the rows of a blob: each table's segments, in the dtype that a build asks for."""

from __future__ import annotations

from collections.abc import Iterable

from pleexport.dtypes import TableDtype, packed_bytes
from pleexport.model import Table
from pleexport.runtime.blob_layout import (
    CHECKSUM_BYTES,
    ROW_ALIGNMENT,
    SEGMENT_ALIGNMENT,
    Segment,
    scale_bytes,
)
from pleexport.sizes import align

# Values of a row that share a scale.
_GROUP_SIZES = {"int8": 128, "int4": 32}
_SCALE_DTYPE = "fp16"


def plan_segments(tables: Iterable[Table], table_dtype: TableDtype, source: str) -> list[Segment]:
    """Lay out the segments of a row: tables in order, layer after layer.

    Args:
        table_dtype: what a build asks for.
        source: the checkpoint's dtype, which "source" means.
    """
    segments: list[Segment] = []
    position = 0
    for table in tables:
        dtype = table.source_dtype(source) if table_dtype == "source" else table_dtype
        for layer in range(table.layers or 1):
            group_size = min(_GROUP_SIZES[dtype], table.width) if dtype in _GROUP_SIZES else None
            segment = Segment(
                name=table.name if table.layers is None else f"{table.name}.{layer}",
                table=table.name,
                layer=None if table.layers is None else layer,
                offset=position,
                width=table.width,
                dtype=dtype,
                group_size=group_size,
                scale_dtype=_SCALE_DTYPE if group_size else None,
                scale_offset=align(
                    position + packed_bytes(table.width, dtype), scale_bytes(_SCALE_DTYPE)
                )
                if group_size
                else None,
                multiplier=table.multiplier,
            )
            segments.append(segment)
            position = align(segment.end, SEGMENT_ALIGNMENT)
    return segments


def row_stride(segments: list[Segment]) -> int:
    """Bytes from one row to the next; the last hold the row's checksum."""
    return align(max(segment.end for segment in segments) + CHECKSUM_BYTES, ROW_ALIGNMENT)
