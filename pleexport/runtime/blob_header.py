"""Read the header of a blob, and refuse one that breaks a rule of docs/blob-format.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pleexport.checked_header import CHECKSUM_BYTES, HEADER_CHECKSUM, header_is_damaged
from pleexport.dtypes import CODED, COMPUTED
from pleexport.errors import BlobError, CheckFailed
from pleexport.runtime.blob_layout import (
    CHECKSUM_CHUNK_BYTES,
    CHECKSUMS,
    FORMAT,
    MINIMUM_PAGE_SIZE,
    ROW_ALIGNMENT,
    ROWS,
    SEGMENT_ALIGNMENT,
    VERSION,
    Segment,
    scale_bytes,
)
from pleexport.safetensors_file import SafetensorsFile, unique_pairs
from pleexport.sizes import groups

_METADATA = {
    "format",
    "version",
    "page_size",
    "first_row",
    "num_rows_total",
    "row_aliases",
    "segments",
    "source_digest",
}
# In the order of the file.
_TENSORS = {HEADER_CHECKSUM: ("uint64", 1), ROWS: ("uint8", 2), CHECKSUMS: ("uint64", 1)}
_SCALE_DTYPES = ("fp16", "fp32")
_DAMAGED = "copy the bundle again, or rebuild it"
_NEWER = "install a newer pleexport"


@dataclass(frozen=True)
class Run:
    """A table's segments, which lie at equal distances in a row."""

    first: Segment
    count: int
    pitch: int
    per_layer: bool


@dataclass(frozen=True)
class BlobHeader:
    """What the header of a blob says.

    Attributes:
        first_row: of the file; 0 but in shards.
        num_rows: of the file, `num_rows_total` of all shards together.
        row_aliases: pairs of a token id and the row that it selects.
        runs: by table.
    """

    first_row: int
    num_rows: int
    num_rows_total: int
    row_stride: int
    num_chunks: int
    segments: list[Segment]
    row_aliases: list[tuple[int, int]]
    runs: dict[str, Run]
    source_digest: str


def read_header(file: SafetensorsFile) -> BlobHeader:
    """The header of a blob, checked.

    Raises:
        BlobError: it breaks a rule, which the message names.
        CheckFailed: it does not match its checksum.
    """
    if file.metadata.get("format") != FORMAT:
        raise _broken(file, "is a safetensors file, but not a blob (B-02)")
    # Before the version: a damaged one must not look like a newer one.
    _check_checksum(file)
    _check_version(file)
    _check_names(file)
    num_rows, stride, chunks = _check_tensors(file)
    first_row, total = _read_range(file, num_rows)
    segments = _read_segments(file)
    _check_places(file, segments, stride)
    return BlobHeader(
        first_row=first_row,
        num_rows=num_rows,
        num_rows_total=total,
        row_stride=stride,
        num_chunks=chunks,
        segments=segments,
        row_aliases=_read_aliases(file, total),
        runs=_plan_runs(file, segments),
        source_digest=file.metadata["source_digest"],
    )


def _broken(file: SafetensorsFile, what: str, hint: str = _DAMAGED) -> BlobError:
    return BlobError(f"`{file.path}`: {what}", hint=hint)


def _check_checksum(file: SafetensorsFile) -> None:
    # Version 1 has none; in any other file that is B-01.
    if header_is_damaged(file):
        raise CheckFailed(
            f"`{file.path}` is damaged: its header does not match its checksum (B-11)",
            hint=_DAMAGED,
        )


def _check_version(file: SafetensorsFile) -> None:
    version = file.metadata.get("version")
    if version != VERSION:
        raise _broken(
            file,
            f"has blob version {version!r}; this reader knows {VERSION} (B-03)",
            hint="build the bundle again from its checkpoint" if version == "1" else _NEWER,
        )


def _check_names(file: SafetensorsFile) -> None:
    unknown = sorted(file.metadata.keys() - _METADATA) + sorted(
        file.entries.keys() - _TENSORS.keys()
    )
    if unknown:
        raise _broken(
            file, f"has `{unknown[0]}`, which this reader does not know (B-04)", hint=_NEWER
        )
    missing = sorted(_METADATA - file.metadata.keys())
    if missing:
        raise _broken(file, f"lacks the metadata `{missing[0]}` (B-05)")


def _check_tensors(file: SafetensorsFile) -> tuple[int, int, int]:
    """Rows, bytes of a row, chunks."""
    for name, (dtype, dimensions) in _TENSORS.items():
        entry = file.entries.get(name)
        if entry is None or entry.dtype != dtype or len(entry.shape) != dimensions:
            raise _broken(file, f"needs tensor `{name}` of dtype {dtype} (B-01)")
    rows = file.entries[ROWS]
    in_order = sorted(file.entries.values(), key=lambda entry: entry.offset)
    if file.entries[HEADER_CHECKSUM].shape != (1,) or [e.name for e in in_order] != [*_TENSORS]:
        raise _broken(file, f"does not begin with one `{HEADER_CHECKSUM}` and its rows (B-01)")
    num_rows, stride = rows.shape
    if num_rows == 0 or stride == 0 or stride % ROW_ALIGNMENT:
        raise _broken(file, f"has {num_rows} rows of {stride} bytes (B-01)")
    page_size = _integer(file, "page_size")
    if page_size < MINIMUM_PAGE_SIZE or rows.offset % page_size:
        raise _broken(
            file,
            f"has rows at byte {rows.offset}, which is not a multiple of a page size of at least "
            f"{MINIMUM_PAGE_SIZE} (B-07)",
        )
    (chunks,) = file.entries[CHECKSUMS].shape
    if chunks != groups(rows.nbytes, CHECKSUM_CHUNK_BYTES):
        raise _broken(file, f"has {chunks} checksums, not one for each chunk (B-10)")
    return num_rows, stride, chunks


def _read_range(file: SafetensorsFile, num_rows: int) -> tuple[int, int]:
    """The first row, and how many rows all shards have together."""
    first, total = _integer(file, "first_row"), _integer(file, "num_rows_total")
    if first + num_rows > total:
        raise _broken(file, f"says that it has {num_rows} rows from {first} of {total} (B-12)")
    return first, total


def _json(file: SafetensorsFile, name: str) -> Any:
    try:
        return json.loads(file.metadata[name], object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as err:
        raise _broken(file, f"has metadata `{name}` that is not valid JSON (B-05)") from err


def _integer(file: SafetensorsFile, name: str) -> int:
    value = _json(file, name)
    if type(value) is not int or value < 0:
        raise _broken(file, f"has metadata `{name}` that is not a number of rows or bytes (B-05)")
    return value


def _read_segments(file: SafetensorsFile) -> list[Segment]:
    try:
        segments = msgspec.convert(_json(file, "segments"), list[Segment])
    except msgspec.ValidationError as err:
        raise _broken(file, f"has a malformed segment: {err} (B-06)") from err
    if not segments:
        raise _broken(file, "has no segments (B-06)")
    names = [segment.name for segment in segments]
    if len(set(names)) != len(names):
        raise _broken(file, "has two segments of one name (B-06)")
    for segment in segments:
        problem = _problem(segment)
        if problem:
            raise _broken(file, f"segment `{segment.name}` {problem} (B-06)")
    return segments


def _problem(segment: Segment) -> str | None:
    """What a segment says of itself that cannot be."""
    if segment.dtype not in (*COMPUTED, *CODED):
        return f"has dtype `{segment.dtype}`, which this reader does not know"
    if not abs(segment.multiplier) <= float(np.finfo(np.float32).max):
        return f"has multiplier {segment.multiplier}"
    for field in ("group_size", "scale_dtype", "scale_offset"):
        given = getattr(segment, field) is not None
        if given != (segment.dtype in CODED):
            scaled = "has no scales" if given else "needs scales"
            return f"of dtype `{segment.dtype}` {scaled}, but `{field}` is {'not ' * given}null"
    if segment.scale_dtype not in (None, *_SCALE_DTYPES):
        return f"has scales of dtype `{segment.scale_dtype}`, which this reader does not know"
    if (segment.group_size or 1) > segment.width:
        return f"has groups of {segment.group_size} of its {segment.width} elements"
    return None


def _check_places(file: SafetensorsFile, segments: list[Segment], stride: int) -> None:
    position = 0
    for segment in segments:
        where = f"segment `{segment.name}`"
        codes_end = segment.offset + segment.code_bytes
        scales_begin = codes_end if segment.scale_offset is None else segment.scale_offset
        alignment = scale_bytes(segment.scale_dtype) if segment.scale_dtype else 1
        for what, place, unit in (
            ("begins", segment.offset, SEGMENT_ALIGNMENT),
            ("has scales", scales_begin, alignment),
        ):
            if place % unit:
                raise _broken(
                    file, f"{where} {what} at byte {place}, which is no multiple of {unit} (B-08)"
                )
        if segment.offset < position or scales_begin < codes_end:
            raise _broken(file, f"{where} overlaps what lies before it (B-08)")
        if segment.end > stride - CHECKSUM_BYTES:
            raise _broken(
                file,
                f"{where} ends at byte {segment.end} of rows of {stride}, which end with a "
                "checksum (B-08)",
            )
        position = segment.end


def _plan_runs(file: SafetensorsFile, segments: list[Segment]) -> dict[str, Run]:
    by_table: dict[str, list[Segment]] = {}
    for segment in segments:
        by_table.setdefault(segment.table, []).append(segment)
    return {name: _plan_run(file, name, own) for name, own in by_table.items()}


def _plan_run(file: SafetensorsFile, name: str, own: list[Segment]) -> Run:
    first, per_layer = own[0], own[0].layer is not None
    pitch = own[1].offset - first.offset if len(own) > 1 else 0
    for i, segment in enumerate(own):
        scale = None if first.scale_offset is None else first.scale_offset + i * pitch
        expected = msgspec.structs.replace(
            first,
            name=segment.name,
            layer=i if per_layer else None,
            offset=first.offset + i * pitch,
            scale_offset=scale,
        )
        if segment != expected or (len(own) > 1 and not per_layer):
            raise _broken(
                file, f"segment `{segment.name}` breaks the even order of table `{name}` (B-08)"
            )
    return Run(first, len(own), pitch, per_layer)


def _read_aliases(file: SafetensorsFile, num_rows: int) -> list[tuple[int, int]]:
    try:
        aliases = msgspec.convert(_json(file, "row_aliases"), list[tuple[int, int]])
    except msgspec.ValidationError as err:
        raise _broken(file, f"has malformed row aliases: {err} (B-09)") from err
    for token_id, row in aliases:
        if not (0 <= token_id < num_rows and 0 <= row < num_rows):
            raise _broken(file, f"has row alias {token_id} -> {row} outside its rows (B-09)")
    aliased = {token_id for token_id, _ in aliases}
    if len(aliased) != len(aliases) or any(row in aliased for _, row in aliases):
        raise _broken(file, "has row aliases that can be read in two ways (B-09)")
    return aliases
