"""Lay out the rows of a blob: each table's segments, in the dtype that a build asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pleexport.checked_header import CHECKSUM_BYTES
from pleexport.dtypes import TableDtype, packed_bytes
from pleexport.model import Codes, Table
from pleexport.quantize import GRID_GROUP
from pleexport.runtime.blob_layout import (
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
    tables: Iterable[Table],
    table_dtype: TableDtype,
    source: str,
    *,
    dtypes: Mapping[str, TableDtype] = MappingProxyType({}),
) -> list[Segment]:
    """Lay out the segments of a row: tables in order, layer after layer.

    Args:
        table_dtype: what a build asks for.
        source: the checkpoint's dtype, which "source" means but for tables with codes.
        dtypes: of tables that are stored otherwise, by name.
    """
    segments: list[Segment] = []
    position = 0
    for table in tables:
        asked = dtypes.get(table.name, table_dtype)
        codes = _segment_codes(table, asked)
        dtype = table.source_dtype(source) if asked == "source" else asked
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
        return table.segment_codes
    if table_dtype not in _GROUP_SIZES:
        return None
    return Codes(table_dtype, table_group_size(table, table_dtype), _SCALE_DTYPE)


def table_group_size(table: Table, dtype: str) -> int:
    """Values of a row that share a scale in int8 or int4."""
    return min(_GROUP_SIZES[dtype], table.width)


def _scale_offset(codes_begin: int, width: int, codes: Codes) -> int:
    return align(codes_begin + packed_bytes(width, codes.dtype), scale_bytes(codes.scale_dtype))


def row_stride(segments: list[Segment]) -> int:
    """Bytes from one row to the next; the last hold the row's checksum."""
    return align(max(segment.end for segment in segments) + CHECKSUM_BYTES, ROW_ALIGNMENT)
