"""Stream a model's tables into a blob, a few thousand rows at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from pleexport.checked_header import CHECKSUM_BYTES, checked_head
from pleexport.codes import QuantizedRows, Scales, pack_codes
from pleexport.dtypes import bits, numpy_dtype
from pleexport.errors import CheckpointError
from pleexport.export.segments import row_stride
from pleexport.model import Codes, Model, Rows, Table
from pleexport.parallel import map_in_order
from pleexport.quantize import quantize_rows
from pleexport.runtime.blob_layout import (
    CHECKSUM_CHUNK_BYTES,
    CHECKSUMS,
    FORMAT,
    ROWS,
    VERSION,
    ChunkChecksums,
    Segment,
    row_checksums,
)
from pleexport.sizes import groups

_BATCH_BYTES = 2 << 20


class RowSource(Protocol):
    """A model whose tables can be read, such as a `MatchedModel`."""

    @property
    def model(self) -> Model: ...

    def rows(self, table: Table, rows: Rows, /) -> NDArray[np.generic] | QuantizedRows:
        """Rows `[n, row width]` in their source dtype, or codes where the table has them."""
        ...


def blob_bytes(model: Model, segments: list[Segment], page_size: int) -> int:
    """Size of the file that `write_blob` writes."""
    rows = model.num_rows * row_stride(segments)
    chunks = groups(rows, CHECKSUM_CHUNK_BYTES)
    return _rows_offset(model, segments, page_size) + rows + CHECKSUM_BYTES * chunks


def write_blob(
    source: RowSource,
    path: Path,
    *,
    segments: list[Segment],
    page_size: int,
    progress: Callable[[int], object] = lambda _: None,
) -> str:
    """Write tables to `path`.

    Args:
        source: all tables of a model.
        segments: of a row; see `plan_segments`. A table that has none is left out.
        page_size: bytes; the rows begin at a multiple of it.
        progress: called with the number of bytes written since its last call.
    Returns:
        a digest of the source rows.
    Raises:
        CheckpointError: a table holds values that cannot be stored in the dtype.
    Source: docs/blob-format.md.
    """
    model = source.model
    stride = row_stride(segments)
    batch_rows = max(1, _BATCH_BYTES // stride)
    checksums = ChunkChecksums()
    own = {t.name: [s for s in segments if s.table == t.name] for t in model.tables}
    tables = [table for table in model.tables if own[table.name]]
    digests = {table.name: xxhash.xxh3_128() for table in tables}

    def encode(begin: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
        ids = np.arange(begin, min(begin + batch_rows, model.num_rows))
        batch = np.zeros((len(ids), stride), dtype=np.uint8)
        sources = {}
        for table in tables:
            rows = _source_rows(source, table, ids)
            sources[table.name] = _source_bytes(rows)
            _encode(batch, rows, table, own[table.name])
        sums = row_checksums(batch).astype("<u8").view(np.uint8)
        batch[:, -CHECKSUM_BYTES:] = sums.reshape(-1, CHECKSUM_BYTES)
        return batch, sources

    with path.open("wb") as file:
        file.seek(_rows_offset(model, segments, page_size))
        for batch, sources in map_in_order(encode, range(0, model.num_rows, batch_rows)):
            for name, raw in sources.items():
                digests[name].update(raw.data)
            file.write(batch.data)
            checksums.update(batch)
            progress(batch.nbytes)
        file.write(checksums.finish().tobytes())
        digest = "xxh3-128:" + "".join(digests[t.name].hexdigest() for t in tables)
        file.seek(0)
        file.write(_head(model, segments, page_size, digest))
    return digest


def _source_rows(
    source: RowSource, table: Table, ids: NDArray[np.int64]
) -> NDArray[np.generic] | QuantizedRows:
    rows = table.source_rows(ids)
    contiguous = rows[-1] - rows[0] == len(rows) - 1
    return source.rows(table, slice(rows[0], rows[-1] + 1) if contiguous else rows)


def _source_bytes(rows: NDArray[np.generic] | QuantizedRows) -> NDArray[np.uint8]:
    """What the digest of the source covers, row after row."""
    if not isinstance(rows, QuantizedRows):
        return np.ascontiguousarray(rows).view(np.uint8)
    parts = [
        np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)
        for part in (rows.codes, rows.scales, rows.zero_points)
        if part is not None
    ]
    return np.concatenate(parts, axis=1)


def _encode(
    batch: NDArray[np.uint8],
    rows: NDArray[np.generic] | QuantizedRows,
    table: Table,
    own: list[Segment],
) -> None:
    """Write one table's segments of a batch of rows; all segments of a table are alike."""
    first, count = own[0], len(own)
    pitch = own[1].offset - first.offset if count > 1 else 0
    slots = np.lib.stride_tricks.as_strided(
        batch[:, first.offset :],
        (len(batch), count, first.end - first.offset),
        (batch.strides[0], pitch, 1),
    )
    if isinstance(rows, QuantizedRows):
        assert table.codes is not None
        if not np.isfinite(rows.scales).all():
            raise CheckpointError(
                f"table `{table.name}` has scales that are not finite",
                hint="the checkpoint may be damaged; fetch it again",
            )
        if table.segment_codes and _codes_of(first) == table.segment_codes:
            _store(slots, first, rows.codes, rows.scales)
            return
        rows = rows.values(min(table.codes.group_size, table.width))
    values = rows.reshape(len(batch), count, table.width)
    if first.group_size is None:
        slots[:] = _narrowed(values, table, first.dtype).view(np.uint8).reshape(slots.shape)
    else:
        _store(slots, first, *_quantized(values, table, first))


def _codes_of(segment: Segment) -> Codes | None:
    """How it is quantized."""
    if segment.group_size is None or segment.scale_dtype is None:
        return None
    return Codes(segment.dtype, segment.group_size, segment.scale_dtype)


def _narrowed(values: NDArray[np.generic], table: Table, dtype: str) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        raw: NDArray[np.generic] = values.astype(numpy_dtype(dtype), order="C")
    if raw.dtype != values.dtype and not np.isfinite(raw).all():
        raise CheckpointError(
            f"table `{table.name}` holds values that are not finite in {dtype}",
            hint="`--table-dtype source` keeps the values as they are",
        )
    return raw


def _quantized(
    values: NDArray[np.generic], table: Table, segment: Segment
) -> tuple[NDArray[np.int8], Scales]:
    assert segment.group_size is not None
    try:
        return quantize_rows(
            values.astype(np.float32),
            bits=bits(segment.dtype),
            group_size=segment.group_size,
            rounding="grid" if table.on_grid and segment.dtype == "int4" else "searched",
        )
    except ValueError as err:
        raise CheckpointError(
            f"table `{table.name}` cannot be stored as {segment.dtype}: {err}",
            hint="`--table-dtype source` keeps the values as they are",
        ) from err


def _store(
    slots: NDArray[np.uint8], segment: Segment, codes: NDArray[np.int8], scales: Scales
) -> None:
    """Put codes `[n, segments, W]` and their scales into their places."""
    assert segment.scale_offset is not None
    slots[..., : segment.code_bytes] = pack_codes(codes, bits=bits(segment.dtype))
    raw = np.ascontiguousarray(scales).view(np.uint8)
    slots[..., segment.scale_offset - segment.offset :] = raw


def _rows_offset(model: Model, segments: list[Segment], page_size: int) -> int:
    """Byte of the file at which row 0 begins."""
    digest = "xxh3-128:" + "0" * 32 * len({segment.table for segment in segments})
    return len(_head(model, segments, page_size, digest))


def _head(model: Model, segments: list[Segment], page_size: int, source_digest: str) -> bytes:
    """What comes before the rows, which begin at a multiple of the page size."""
    stride = row_stride(segments)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "page_size": str(page_size),
        "first_row": "0",
        "num_rows_total": str(model.num_rows),
        "row_aliases": json.dumps(sorted([i, row] for i, row in model.row_aliases.items())),
        "segments": msgspec.json.encode(segments).decode(),
        "source_digest": source_digest,
    }
    tensors = {
        ROWS: ("U8", [model.num_rows, stride]),
        CHECKSUMS: ("U64", [groups(model.num_rows * stride, CHECKSUM_CHUNK_BYTES)]),
    }
    return checked_head(metadata, tensors, page_size=page_size)
