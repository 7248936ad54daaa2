"""Pages of mapped files: which ones rows lie on, and how to ask for them in advance."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import BlobError
from pleexport.safetensors_file import SafetensorsFile

# Page ranges `[first, end)` of a file.
PageRuns = list[tuple[int, int]]


class RowsFile(ABC):
    """A mapped file of rows. Opening it reads its header only.

    Raises:
        BlobError: it is missing, truncated or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path, error=BlobError)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._file.file_bytes

    @abstractmethod
    def page_runs(self, row_ids: NDArray[np.int64]) -> PageRuns:
        """The pages of the file that rows lie on."""

    def prefetch(self, row_ids: NDArray[np.int64]) -> None:
        """Ask the system to read the pages of all distinct rows at once."""
        ask_for(self._file.mapping, self.page_runs(row_ids))

    def release_pages(self) -> None:
        """Take the file out of this process's memory; it stays in the page cache.

        With a row's page the system maps those around it that it has, hundreds on some systems.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._file.mapping.madvise(mmap.MADV_DONTNEED)


def page_runs(
    row_ids: NDArray[np.int64], *, begin: int, row_bytes: int, page_size: int = mmap.PAGESIZE
) -> PageRuns:
    """The pages that distinct rows lie on, neighbours joined.

    Args:
        begin: byte of the file at which row 0 begins.
        row_bytes: from one row to the next.
    """
    first_bytes = begin + np.unique(row_ids) * row_bytes
    firsts = first_bytes // page_size
    ends = (first_bytes + row_bytes - 1) // page_size + 1
    runs: PageRuns = []
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
    return runs


def ask_for(mapping: mmap.mmap, runs: PageRuns) -> None:
    """Ask the system to read pages of a mapped file at once, where it can be asked."""
    if not hasattr(mapping, "madvise"):
        return
    for first, end in runs:
        begin = first * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, begin, (end - first) * mmap.PAGESIZE)
