"""Map a blob and look rows up. Needs NumPy only."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from pleexport.codes import dequantize_rows, unpack_codes
from pleexport.dtypes import QUANTIZED, TABLE_DTYPES, bits, numpy_dtype
from pleexport.errors import BlobError, CheckFailed, InputError
from pleexport.runtime.blob_layout import (
    CHECKSUM_CHUNK_BYTES,
    CHECKSUMS,
    FORMAT,
    MINIMUM_PAGE_SIZE,
    ROWS,
    VERSION,
    Segment,
)
from pleexport.safetensors_file import SafetensorsFile

_KNOWN_METADATA = {"format", "version", "page_size", "row_aliases", "segments", "source_digest"}


@dataclass(frozen=True)
class _Run:
    """A table's segments, which lie at equal distances in a row."""

    first: Segment
    count: int
    pitch: int
    per_layer: bool


class Blob:
    """A memory-mapped blob.

    Args:
        path: the file.
    Raises:
        BlobError: the file breaks a rule of docs/blob-format.md.
        CheckFailed: a sampled chunk does not match its checksum.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = SafetensorsFile(self.path, error=BlobError)
        self._check_metadata()
        self.segments = self._read_segments()
        self.row_aliases = self._read_aliases()
        self.num_rows, self.row_stride = self._check_tensors()
        self._check_segments()
        self._runs = self._plan_runs()
        last = max(0, self.num_chunks - 1)
        for chunk in sorted({0, last // 2, last}):
            self._check_chunk(chunk)

    @cached_property
    def rows(self) -> NDArray[np.uint8]:
        """All rows, `[num_rows, row_stride]`, as mapped."""
        return self._file.array(ROWS)

    @property
    def rows_offset(self) -> int:
        """Byte of the file at which row 0 begins."""
        return self._file.entries[ROWS].offset

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._file.file_bytes

    @property
    def source_digest(self) -> str:
        """Digest of the tensors that the rows were made from."""
        return self._file.metadata["source_digest"]

    @property
    def num_chunks(self) -> int:
        """Number of checksummed chunks."""
        return self._file.entries[CHECKSUMS].shape[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By table, the shape of what a token id looks up: `(width,)` or `(layers, width)`."""
        return {
            name: (run.count, run.first.width) if run.per_layer else (run.first.width,)
            for name, run in self._runs.items()
        }

    def row_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that token ids select, aliases replaced.

        Raises:
            InputError: an id has no row.
        """
        try:
            rows = np.asarray(ids, dtype=np.int64).reshape(-1)
        except OverflowError as err:
            raise InputError(
                f"a token id has no row; ids go from 0 to {self.num_rows - 1}",
                hint="the ids may come from another model's tokenizer",
            ) from err
        outside = (rows < 0) | (rows >= self.num_rows)
        if outside.any():
            first = int(rows[outside][0])
            raise InputError(
                f"token id {first} has no row; ids go from 0 to {self.num_rows - 1}",
                hint="the ids may come from another model's tokenizer",
            )
        for token_id, row in self.row_aliases:
            rows = np.where(rows == token_id, row, rows)
        return rows

    def prefetch(self, row_ids: NDArray[np.int64]) -> None:
        """Ask the system to read the pages of all distinct rows at once."""
        if not hasattr(self._file.mapping, "madvise"):
            return
        for first, end in self._page_runs(row_ids):
            self._file.mapping.madvise(
                mmap.MADV_WILLNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE
            )

    def forget_pages(self) -> None:
        """Drop the blob from this process's memory and from the page cache, for cold timings.

        Raises:
            InputError: the system has no way to ask for it.
        """
        if not hasattr(os, "posix_fadvise"):
            raise InputError(
                "this system cannot drop a file from its page cache",
                hint="leave out `--cold`, which needs Linux",
            )
        self._file.mapping.madvise(mmap.MADV_DONTNEED)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # unwritten pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def pages(self, row_ids: NDArray[np.int64]) -> int:
        """How many distinct pages of the file the rows lie on."""
        return sum(end - first for first, end in self._page_runs(row_ids))

    def lookup(
        self, row_ids: NDArray[np.int64], tables: Collection[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """By table, the vectors of rows, multiplied once: `[T, width]` or `[T, layers, width]`.

        Args:
            tables: those wanted; all by default.
        """
        if tables is None:
            gathered = self.rows[row_ids]
            return {name: self._decode(gathered, run) for name, run in self._runs.items()}
        found = {}
        for name in tables:
            run = self._runs[name]
            begin = run.first.offset
            end = run.first.end + run.pitch * (run.count - 1)
            found[name] = self._decode(self.rows[:, begin:end][row_ids], run, begin=begin)
        return found

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Compare every chunk with its checksum.

        Raises:
            CheckFailed: names the first damaged chunk and its token ids.
        """
        for chunk in range(self.num_chunks):
            self._check_chunk(chunk)
            progress(CHECKSUM_CHUNK_BYTES)

    def _decode(
        self, gathered: NDArray[np.uint8], run: _Run, *, begin: int = 0
    ) -> NDArray[np.float32]:
        """Vectors of one table, from bytes of rows that start at byte `begin`."""
        segment = run.first
        slots = np.lib.stride_tricks.as_strided(
            gathered[:, segment.offset - begin :],
            (len(gathered), run.count, segment.end - segment.offset),
            (gathered.strides[0], run.pitch, 1),
            writeable=False,
        )
        codes = np.ascontiguousarray(slots[..., : segment.code_bytes])
        if segment.group_size is None:
            values: NDArray[np.float32] = codes.view(numpy_dtype(segment.dtype)).astype(np.float32)
        else:
            assert segment.scale_offset is not None
            raw = np.ascontiguousarray(slots[..., segment.scale_offset - segment.offset :])
            signed = unpack_codes(codes, bits=bits(segment.dtype), width=segment.width)
            values = dequantize_rows(signed, raw.view(np.float16), group_size=segment.group_size)
        values *= np.float32(segment.multiplier)
        return values if run.per_layer else values[:, 0]

    def _page_runs(self, row_ids: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Page ranges `[first, end)` of the file that distinct rows lie on, neighbours joined."""
        distinct = np.unique(row_ids)
        begin = self.rows_offset + distinct * self.row_stride
        firsts = begin // mmap.PAGESIZE
        ends = (begin + self.row_stride - 1) // mmap.PAGESIZE + 1
        runs: list[tuple[int, int]] = []
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            if runs and first <= runs[-1][1]:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((first, end))
        return runs

    def _fail(self, what: str, hint: str = "copy the bundle again, or rebuild it") -> BlobError:
        return BlobError(f"`{self.path}`: {what}", hint=hint)

    def _check_metadata(self) -> None:
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            raise self._fail("is a safetensors file, but not a blob (B-02)")
        if metadata.get("version") != VERSION:
            raise self._fail(
                f"has blob version {metadata.get('version')!r}; this reader knows {VERSION} (B-03)",
                hint="install a newer pleexport",
            )
        unknown = sorted(set(metadata) - _KNOWN_METADATA) + sorted(
            set(self._file.entries) - {ROWS, CHECKSUMS}
        )
        if unknown:
            raise self._fail(
                f"has `{unknown[0]}`, which this reader does not know (B-04)",
                hint="install a newer pleexport",
            )
        missing = sorted(_KNOWN_METADATA - set(metadata))
        if missing:
            raise self._fail(f"lacks the metadata `{missing[0]}` (B-05)")

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._file.metadata[name])
        except (ValueError, RecursionError) as err:
            raise self._fail(f"has metadata `{name}` that is not valid JSON (B-05)") from err

    def _read_segments(self) -> list[Segment]:
        try:
            segments = msgspec.convert(self._json("segments"), list[Segment])
        except msgspec.ValidationError as err:
            raise self._fail(f"has a malformed segment: {err} (B-06)") from err
        if not segments:
            raise self._fail("has no segments (B-06)")
        return segments

    def _read_aliases(self) -> list[tuple[int, int]]:
        try:
            return msgspec.convert(self._json("row_aliases"), list[tuple[int, int]])
        except msgspec.ValidationError as err:
            raise self._fail(f"has malformed row aliases: {err} (B-09)") from err

    def _check_tensors(self) -> tuple[int, int]:
        for name, dtype, dimensions in ((ROWS, "uint8", 2), (CHECKSUMS, "uint64", 1)):
            entry = self._file.entries.get(name)
            if entry is None or entry.dtype != dtype or len(entry.shape) != dimensions:
                raise self._fail(f"needs tensor `{name}` of dtype {dtype} (B-01)")
        num_rows, stride = self._file.entries[ROWS].shape
        if num_rows == 0 or stride == 0:
            raise self._fail(f"has {num_rows} rows of {stride} bytes (B-01)")
        page_size = self._json("page_size")
        if (
            type(page_size) is not int
            or page_size < MINIMUM_PAGE_SIZE
            or self.rows_offset % page_size
        ):
            raise self._fail(
                f"has rows at byte {self.rows_offset}, which is not a multiple of a page size of "
                f"at least {MINIMUM_PAGE_SIZE} (B-07)"
            )
        if self.num_chunks != -(-num_rows * stride // CHECKSUM_CHUNK_BYTES):
            raise self._fail(f"has {self.num_chunks} checksums, not one for each chunk (B-10)")
        for token_id, row in self.row_aliases:
            if not (0 <= token_id < num_rows and 0 <= row < num_rows):
                raise self._fail(f"has row alias {token_id} -> {row} outside its rows (B-09)")
        return num_rows, stride

    def _check_segments(self) -> None:
        position = 0
        for segment in self.segments:
            where = f"segment `{segment.name}`"
            if segment.dtype not in TABLE_DTYPES[1:]:
                raise self._fail(f"{where} has dtype `{segment.dtype}`, which is not known (B-06)")
            if segment.width < 1 or not np.isfinite(segment.multiplier):
                raise self._fail(f"{where} has an impossible width or multiplier (B-06)")
            grouped = segment.dtype in QUANTIZED
            fields = (segment.group_size, segment.scale_dtype, segment.scale_offset)
            if any((field is not None) != grouped for field in fields):
                raise self._fail(f"{where} does not say how it is scaled, or says too much (B-06)")
            if grouped and (segment.scale_dtype != "fp16" or not segment.group_size):
                raise self._fail(f"{where} has scales that this reader does not know (B-06)")
            if segment.group_size is not None and segment.group_size < 1:
                raise self._fail(f"{where} has group size {segment.group_size} (B-06)")
            codes_end = segment.offset + segment.code_bytes
            scales_begin = codes_end if segment.scale_offset is None else segment.scale_offset
            if segment.offset < position or scales_begin < codes_end:
                raise self._fail(f"{where} overlaps what lies before it (B-08)")
            if segment.end > self.row_stride:
                raise self._fail(
                    f"{where} ends at byte {segment.end} of rows of {self.row_stride} (B-08)"
                )
            position = segment.end
        names = [segment.name for segment in self.segments]
        if len(set(names)) != len(names):
            raise self._fail("has two segments of one name (B-06)")

    def _plan_runs(self) -> dict[str, _Run]:
        by_table: dict[str, list[Segment]] = {}
        for segment in self.segments:
            by_table.setdefault(segment.table, []).append(segment)
        return {name: self._plan_run(name, own) for name, own in by_table.items()}

    def _plan_run(self, name: str, own: list[Segment]) -> _Run:
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
                raise self._fail(
                    f"segment `{segment.name}` breaks the even order of table `{name}` (B-08)"
                )
        return _Run(first, len(own), pitch, per_layer)

    def _check_chunk(self, chunk: int) -> None:
        begin = chunk * CHECKSUM_CHUNK_BYTES
        data = self.rows.reshape(-1)[begin : begin + CHECKSUM_CHUNK_BYTES]
        if xxhash.xxh3_64_intdigest(data.data) != int(self._file.array(CHECKSUMS)[chunk]):
            first = begin // self.row_stride
            last = (begin + len(data) - 1) // self.row_stride
            raise CheckFailed(
                f"`{self.path}` is damaged: the rows of token ids {first} to {last} do not match "
                "their checksum (B-10)",
                hint="copy the bundle again, or rebuild it",
            )
