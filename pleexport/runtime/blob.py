"""Map a blob and look rows up. Needs NumPy and xxhash only."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pleexport.codes import Scales, dequantize_rows, unpack_codes
from pleexport.dtypes import bits, numpy_dtype
from pleexport.errors import BlobError, CheckFailed, InputError
from pleexport.runtime.blob_header import Run, read_header
from pleexport.runtime.blob_layout import (
    CHECKSUM_CHUNK_BYTES,
    CHECKSUMS,
    ROWS,
    row_checksums,
    stored_checksums,
)
from pleexport.runtime.pages import PageRuns, ask_for, page_runs
from pleexport.runtime.tied import TiedRows
from pleexport.safetensors_file import SafetensorsFile
from pleexport.sizes import groups


class Blob:
    """A memory-mapped blob. Opening it reads its header only; every lookup checks its rows.

    Args:
        path: the file.
        tied: a table that is not in the blob, but in the file of a matrix.
    Attributes:
        segments: of a row, those of the blob first.
    Raises:
        BlobError: the file breaks a rule of docs/blob-format.md.
        CheckFailed: its header does not match its checksum.
    """

    def __init__(self, path: str | Path, *, tied: TiedRows | None = None) -> None:
        self.path = Path(path)
        self._file = SafetensorsFile(self.path, error=BlobError)
        header = read_header(self._file)
        self.segments = header.segments + ([tied.segment] if tied else [])
        self.row_aliases = header.row_aliases
        self.num_rows = header.num_rows
        self.row_stride = header.row_stride
        self.num_chunks = header.num_chunks
        self.source_digest = header.source_digest
        self._runs = header.runs
        self._tied = tied
        if tied:
            _check_tied(self, tied)

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
        """Bytes of all files that rows are read from."""
        return self._file.file_bytes + (self._tied.nbytes if self._tied else 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token id's row, in all files."""
        return self.row_stride + (self._tied.row_bytes if self._tied else 0)

    @property
    def tied_table(self) -> str | None:
        """The table that is not in the blob, but in the file of a matrix."""
        return self._tied.segment.table if self._tied else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By table, the shape of what a token id looks up: `(width,)` or `(layers, width)`."""
        own: dict[str, tuple[int, ...]] = {
            name: (run.count, run.first.width) if run.per_layer else (run.first.width,)
            for name, run in self._runs.items()
        }
        return own | ({self._tied.segment.table: (self._tied.segment.width,)} if self._tied else {})

    def row_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that token ids select, aliases replaced.

        Raises:
            InputError: an id has no row.
        """
        try:
            rows = np.asarray(ids, dtype=np.int64).reshape(-1)
        except OverflowError as err:
            raise InputError(
                f"a token id does not fit 64 bits; ids go from 0 to {self.num_rows - 1}",
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
        ask_for(self._file.mapping, self._page_runs(row_ids))
        if self._tied:
            self._tied.prefetch(row_ids)

    def forget_pages(self) -> None:
        """Drop the blob from this process's memory and from the page cache, for cold timings.

        What is tied stays: every token is multiplied by it.

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
        """How many distinct pages of the files the rows lie on."""
        runs = self._page_runs(row_ids) + (self._tied.page_runs(row_ids) if self._tied else [])
        return sum(end - first for first, end in runs)

    def lookup(
        self, row_ids: NDArray[np.int64], tables: Collection[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """By table, the vectors of rows, multiplied once: `[T, width]` or `[T, layers, width]`.

        Args:
            tables: those wanted; all by default.
        Raises:
            CheckFailed: a row does not match its checksum; the token id is named.
        """
        gathered = self.rows[row_ids]
        self._check_rows(row_ids, gathered)
        wanted = self.shapes if tables is None else tables
        # What float32 cannot hold is infinite, in every language; whoever samples refuses it.
        with np.errstate(over="ignore", invalid="ignore"):
            found = {n: _decode(gathered, self._runs[n]) for n in wanted if n in self._runs}
            if self._tied and self.tied_table in wanted:
                found[self._tied.segment.table] = self._tied.lookup(row_ids)
        return found

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Compare every row, in all files, and every chunk with its checksum.

        Raises:
            CheckFailed: names the first damaged row.
        """
        for chunk in range(self.num_chunks):
            begin = chunk * CHECKSUM_CHUNK_BYTES
            end = begin + CHECKSUM_CHUNK_BYTES
            # Those that begin in it; a damaged one that ends in it was found with the chunk before.
            first, last = groups(begin, self.row_stride), groups(end, self.row_stride)
            self._check_rows(np.arange(first, min(last, self.num_rows)), self.rows[first:last])
            self._check_chunk(chunk)
            progress(CHECKSUM_CHUNK_BYTES)
        if self._tied:
            self._tied.verify(progress)

    def _check_rows(self, row_ids: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        bad = row_checksums(rows) != stored_checksums(rows)
        if bad.any():
            raise CheckFailed(
                f"`{self.path}` is damaged: the row of token id {row_ids[bad][0]} does not match "
                "its checksum (B-16)",
                hint="copy the bundle again, or rebuild it",
            )

    def _check_chunk(self, chunk: int) -> None:
        """Compare a chunk, all of whose rows match their own checksums."""
        begin = chunk * CHECKSUM_CHUNK_BYTES
        data = self.rows.reshape(-1)[begin : begin + CHECKSUM_CHUNK_BYTES]
        if xxhash.xxh3_64_intdigest(data.data) != int(self._file.array(CHECKSUMS)[chunk]):
            first = begin // self.row_stride
            last = (begin + len(data) - 1) // self.row_stride
            raise CheckFailed(
                f"`{self.path}` is damaged: the rows of token ids {first} to {last} lie in other "
                "places, or the checksum of their chunk is wrong (B-19)",
                hint="copy the bundle again, or rebuild it",
            )

    def _page_runs(self, row_ids: NDArray[np.int64]) -> PageRuns:
        return page_runs(row_ids, begin=self.rows_offset, row_bytes=self.row_stride)


def _check_tied(blob: Blob, tied: TiedRows) -> None:
    """Refuse a table in a file of its own that does not go with a blob."""
    table = tied.segment.table
    twice = any(segment.table == table for segment in blob.segments[:-1])
    if twice or tied.num_rows < blob.num_rows:
        problem = "both have" if twice else f"it has {tied.num_rows} rows of"
        raise BlobError(
            f"`{tied.path}` does not go with `{blob.path}`, which has {blob.num_rows} rows: "
            f"{problem} table `{table}` (T-07)",
            hint="files of two bundles may be mixed; copy the bundle again, or rebuild it",
        )


def _decode(rows: NDArray[np.uint8], run: Run) -> NDArray[np.float32]:
    """Vectors of one table, from rows."""
    segment = run.first
    slots = np.lib.stride_tricks.as_strided(
        rows[:, segment.offset :],
        (len(rows), run.count, segment.end - segment.offset),
        (rows.strides[0], run.pitch, 1),
        writeable=False,
    )
    stored = np.ascontiguousarray(slots[..., : segment.code_bytes])
    if segment.group_size is None:
        values: NDArray[np.float32] = stored.view(numpy_dtype(segment.dtype)).astype(np.float32)
    else:
        assert segment.scale_offset is not None
        assert segment.scale_dtype is not None
        codes = unpack_codes(stored, bits=bits(segment.dtype), width=segment.width)
        raw = np.ascontiguousarray(slots[..., segment.scale_offset - segment.offset :])
        scales: Scales = raw.view(numpy_dtype(segment.scale_dtype))
        values = dequantize_rows(codes, scales, group_size=segment.group_size)
    values *= np.float32(segment.multiplier)
    return values if run.per_layer else values[:, 0]
