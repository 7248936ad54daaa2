"""One file of a blob: the rows of a range of token ids. A whole blob is the one shard of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pleexport.errors import BlobError, CheckFailed
from pleexport.runtime.blob_header import read_header
from pleexport.runtime.blob_layout import (
    CHECKSUM_CHUNK_BYTES,
    CHECKSUMS,
    ROWS,
    row_checksums,
    stored_checksums,
)
from pleexport.runtime.pages import PageRuns, RowsFile, page_runs
from pleexport.sizes import groups

_DAMAGED = "copy the bundle again, or rebuild it"
_MIXED = "files of two bundles may be mixed; copy the bundle again, or rebuild it"


class Shard(RowsFile):
    """A mapped file of rows. Opening it reads its header only; rows are those of the blob.

    Attributes:
        first: its first row.
        end: the row behind its last one.
    Raises:
        BlobError: the file breaks a rule of docs/blob-format.md.
        CheckFailed: its header does not match its checksum.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header = read_header(self._file)
        self.first = self.header.first_row
        self.end = self.first + self.header.num_rows

    @cached_property
    def _rows(self) -> NDArray[np.uint8]:
        """`[rows, row_stride]`, as mapped."""
        return self._file.array(ROWS)

    @property
    def metadata(self) -> dict[str, str]:
        """As the header has it."""
        return self._file.metadata

    @property
    def shared(self) -> dict[str, object]:
        """What all shards of a blob agree in, by name."""
        return {"row_stride": self.header.row_stride, **self.metadata, "first_row": None}

    @property
    def rows_offset(self) -> int:
        """Byte of the file at which its first row begins."""
        return self._file.entries[ROWS].offset

    def rows(self, row_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of rows `[n, row_stride]`, each compared with its checksum.

        Raises:
            CheckFailed: a row does not match its checksum; the token id is named.
        """
        rows = self._rows[row_ids - self.first if self.first else row_ids]
        self._check(row_ids, rows)
        return rows

    def page_runs(self, row_ids: NDArray[np.int64]) -> PageRuns:
        """The pages of the file that rows lie on."""
        stride = self.header.row_stride
        return page_runs(row_ids - self.first, begin=self.rows_offset, row_bytes=stride)

    def forget_pages(self) -> None:
        """Drop the file from this process's memory and from the page cache, on Linux."""
        self.release_pages()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # unwritten pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def verify(self, progress: Callable[[int], object]) -> None:
        """Compare every row and every chunk with its checksum.

        Raises:
            CheckFailed: names the first damaged row.
        """
        stride = self.header.row_stride
        for chunk in range(self.header.num_chunks):
            begin = chunk * CHECKSUM_CHUNK_BYTES
            end = begin + CHECKSUM_CHUNK_BYTES
            # Those that begin in it; a damaged one that ends in it was found with the chunk before.
            first, last = groups(begin, stride), min(groups(end, stride), self.header.num_rows)
            self._check(np.arange(first, last) + self.first, self._rows[first:last])
            self._check_chunk(chunk)
            progress(CHECKSUM_CHUNK_BYTES)

    def _check(self, row_ids: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        bad = row_checksums(rows) != stored_checksums(rows)
        if bad.any():
            raise CheckFailed(
                f"`{self.path}` is damaged: the row of token id {row_ids[bad][0]} does not match "
                "its checksum (B-16)",
                hint=_DAMAGED,
            )

    def _check_chunk(self, chunk: int) -> None:
        """Compare a chunk, all of whose rows match their own checksums."""
        begin = chunk * CHECKSUM_CHUNK_BYTES
        data = self._rows.reshape(-1)[begin : begin + CHECKSUM_CHUNK_BYTES]
        if xxhash.xxh3_64_intdigest(data.data) != int(self._file.array(CHECKSUMS)[chunk]):
            first = begin // self.header.row_stride + self.first
            last = (begin + len(data) - 1) // self.header.row_stride + self.first
            raise CheckFailed(
                f"`{self.path}` is damaged: the rows of token ids {first} to {last} lie in other "
                "places, or the checksum of their chunk is wrong (B-19)",
                hint=_DAMAGED,
            )


def open_shards(paths: Sequence[Path]) -> list[Shard]:
    """The files of one blob, in the order of their rows.

    Args:
        paths: in any order.
    Raises:
        BlobError: one breaks a rule of docs/blob-format.md, or together they are not one blob.
        CheckFailed: a header does not match its checksum.
    """
    shards = sorted(map(Shard, paths), key=lambda shard: shard.first)
    if len(shards) == 1:
        _check_whole(shards[0])
        return shards
    expected, place = shards[0].shared, 0
    for shard in shards:
        other = sorted(k for k, value in shard.shared.items() if value != expected[k])
        if other:
            raise BlobError(
                f"`{shard.path}` is no shard of the blob of `{shards[0].path}`: they disagree "
                f"about `{other[0]}` (B-12)",
                hint=_MIXED,
            )
        if shard.first != place:
            raise BlobError(
                f"`{shard.path}` begins at row {shard.first}, and the shards before it end at "
                f"{place} (B-12)",
                hint=_MIXED,
            )
        place = shard.end
    total = shards[0].header.num_rows_total
    if place != total:
        raise BlobError(
            f"`{shards[-1].path}` is the last shard and ends at row {place} of {total} (B-12)",
            hint=_DAMAGED,
        )
    return shards


def _check_whole(shard: Shard) -> None:
    total = shard.header.num_rows_total
    if shard.header.num_rows != total:
        raise BlobError(
            f"`{shard.path}`: is a shard, rows {shard.first} to {shard.end - 1} of {total}; this "
            "reader takes whole blobs (B-12)",
            hint="give all shards of the blob, or build the bundle again from its checkpoint",
        )
