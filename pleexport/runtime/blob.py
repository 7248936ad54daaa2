"""Map a blob and look rows up. Needs NumPy and xxhash only."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pleexport.codes import Scales, dequantize_rows, unpack_codes
from pleexport.dtypes import bits, numpy_dtype
from pleexport.errors import BlobError, InputError
from pleexport.runtime.blob_header import Run
from pleexport.runtime.blob_shard import Shard, open_shards
from pleexport.runtime.tied import TiedRows


class Blob:
    """A memory-mapped blob. Opening it reads its header only; every lookup checks its rows.

    Args:
        path: the file, or all shards in any order.
        tied: a table that is not in the blob, but in the file of a matrix.
    Attributes:
        path: the file, or the shard with the first rows.
        segments: of a row, those of the blob first.
        metadata: of the header of that file.
    Raises:
        BlobError: a file breaks a rule of docs/blob-format.md.
        CheckFailed: its header does not match its checksum.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], *, tied: TiedRows | None = None
    ) -> None:
        paths = [path] if isinstance(path, str | Path) else path
        self._shards = open_shards([Path(p) for p in paths])
        self._firsts = np.array([shard.first for shard in self._shards])
        self.path, header = self._shards[0].path, self._shards[0].header
        self.segments = header.segments + ([tied.segment] if tied else [])
        self.row_aliases = header.row_aliases
        self.num_rows = header.num_rows_total
        self.row_stride = header.row_stride
        self.num_chunks = sum(shard.header.num_chunks for shard in self._shards)
        self.source_digest = header.source_digest
        self.metadata = self._shards[0].metadata
        self._runs = header.runs
        self._tied = tied
        if tied:
            _check_tied(self, tied)

    @property
    def rows_offset(self) -> int:
        """Byte of the first file at which row 0 begins."""
        return self._shards[0].rows_offset

    @property
    def nbytes(self) -> int:
        """Bytes of all files that rows are read from."""
        own = sum(shard.nbytes for shard in self._shards)
        return own + (self._tied.nbytes if self._tied else 0)

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
        for shard, mine in self._by_shard(row_ids):
            shard.prefetch(row_ids[mine])
        if self._tied:
            self._tied.prefetch(row_ids)

    def release_pages(self) -> None:
        """Take all files out of this process's memory; they stay in the page cache."""
        for shard in self._shards:
            shard.release_pages()
        if self._tied:
            self._tied.release_pages()

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
        for shard in self._shards:
            shard.forget_pages()

    def pages(self, row_ids: NDArray[np.int64]) -> int:
        """How many distinct pages of the files the rows lie on."""
        runs = self._tied.page_runs(row_ids) if self._tied else []
        for shard, mine in self._by_shard(row_ids):
            runs += shard.page_runs(row_ids[mine])
        return sum(end - first for first, end in runs)

    def stored_rows(self, row_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows `[n, row_stride]` as stored, each compared with its checksum.

        Raises:
            CheckFailed: a row does not match its checksum; the token id is named.
        """
        if len(self._shards) == 1:
            return self._shards[0].rows(row_ids)
        rows = np.empty((len(row_ids), self.row_stride), dtype=np.uint8)
        for shard, mine in self._by_shard(row_ids):
            rows[mine] = shard.rows(row_ids[mine])
        return rows

    def lookup(
        self, row_ids: NDArray[np.int64], tables: Collection[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """By table, the vectors of rows, multiplied once: `[T, width]` or `[T, layers, width]`.

        Args:
            tables: those wanted; all by default.
        Raises:
            CheckFailed: a row does not match its checksum; the token id is named.
        """
        gathered = self.stored_rows(row_ids)
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
        for shard in self._shards:
            shard.verify(progress)
        if self._tied:
            self._tied.verify(progress)

    def _by_shard(
        self, row_ids: NDArray[np.int64]
    ) -> Iterator[tuple[Shard, NDArray[np.intp] | slice]]:
        """The shards that rows lie in, and which of the rows lie in each."""
        if len(self._shards) == 1:
            yield self._shards[0], slice(None)
            return
        numbers = np.searchsorted(self._firsts, row_ids, side="right") - 1
        for number in np.unique(numbers):
            yield self._shards[number], np.flatnonzero(numbers == number)


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
