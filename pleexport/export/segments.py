"""Lay out the rows of a blob: each table's segments, in the dtype that a build asks for."""

from __future__ import annotations

from collections.abc import Iterable

from pleexport.dtypes import QUANTIZED, TableDtype, packed_bytes
from pleexport.model import Codes, Table
from pleexport.quantize import GRID_GROUP
from pleexport.runtime.blob_layout import (
    CHECKSUM_BYTES,
    ROW_ALIGNMENT,
    SEGMENT_ALIGNMENT,
    Segment,
    scale_bytes,
)
from pleexport.sizes import align

# Values of a row that share a scale.
_GROUP_SIZES = {"int8": 128, "int4": GRID_GROUP}
_SCALE_DTYPE = "fp16"


def plan_segments(
    tables: Iterable[Table], table_dtype: TableDtype, source: str, *, trained_grid: bool = False
) -> list[Segment]:
    """Lay out the segments of a row: tables in order, layer after layer.

    Args:
        table_dtype: what a build asks for.
        source: the checkpoint's dtype, which "source" means but for tables with codes.
        trained_grid: tables that were trained for a grid of 4 bits are stored on it.
    """
    segments: list[Segment] = []
    position = 0
    for table in tables:
        on_grid = trained_grid and table.on_grid and table_dtype in QUANTIZED
        codes = _segment_codes(table, "int4" if on_grid else table_dtype)
        dtype = table.source_dtype(source) if table_dtype == "source" else table_dtype
        for layer in range(table.layers or 1):
            segment = Segment(
                name=table.name if table.layers is None else f"{table.name}.{layer}",
                table=table.name,
                layer=None if table.layers is None else layer,
                offset=position,
                width=table.width,
                dtype=codes.dtype if codes else dtype,
                group_size=codes.group_size if codes else None,
                scale_dtype=codes.scale_dtype if codes else None,
                scale_offset=_scale_offset(position, table.width, codes) if codes else None,
                multiplier=table.multiplier,
            )
            segments.append(segment)
            position = align(segment.end, SEGMENT_ALIGNMENT)
    return segments


def _segment_codes(table: Table, table_dtype: TableDtype) -> Codes | None:
    """How a table's segments are quantized; None where they hold floating-point numbers."""
    if table_dtype == "source":
        return table.codes
    if table_dtype not in _GROUP_SIZES:
        return None
    return Codes(table_dtype, min(_GROUP_SIZES[table_dtype], table.width), _SCALE_DTYPE)


def _scale_offset(codes_begin: int, width: int, codes: Codes) -> int:
    return align(codes_begin + packed_bytes(width, codes.dtype), scale_bytes(codes.scale_dtype))


def row_stride(segments: list[Segment]) -> int:
    """Bytes from one row to the next; the last hold the row's checksum."""
    return align(max(segment.end for segment in segments) + CHECKSUM_BYTES, ROW_ALIGNMENT)
