"""Look rows up in the file of a matrix that is multiplied by too: docs/blob-format.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from pleexport.checked_header import HEADER_CHECKSUM, header_is_damaged
from pleexport.codes import dequantize_rows, unpack_codes
from pleexport.dtypes import CODED, bits
from pleexport.errors import BlobError, CheckFailed
from pleexport.runtime.blob_layout import Segment
from pleexport.runtime.pages import PageRuns, RowsFile, page_runs
from pleexport.safetensors_file import SafetensorsFile
from pleexport.tied_layout import (
    CHECKSUMS,
    CODES,
    FORMAT,
    SCALES,
    VERSION,
    TiedLayout,
    tied_checksums,
)

# In the order of the file.
_TENSORS = {
    HEADER_CHECKSUM: ("uint64", 1),
    CODES: ("uint8", 2),
    SCALES: ("fp32", 2),
    CHECKSUMS: ("uint64", 1),
}
_DAMAGED = "copy the bundle again, or rebuild it"
_NEWER = "install a newer pleexport"
_ROWS_AT_ONCE = 4096

Count = Annotated[int, msgspec.Meta(ge=1)]


class _Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str
    version: str
    table: str
    width: Count
    dtype: str
    group_size: Count
    multiplier: float
    weights_digest: str


class TiedRows(RowsFile):
    """A table whose rows are those of a mapped matrix. Opening it reads its header only.

    Args:
        path: the file.
    Attributes:
        segment: the table as if its codes, scales and checksum made one row.
        weights_digest: of the graph that takes the matrix.
    Raises:
        BlobError: the file breaks a rule of docs/blob-format.md.
        CheckFailed: its header does not match its checksum.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        metadata = _read_metadata(self._file)
        _check_tensors(self._file, metadata)
        self.num_rows, code_bytes = self._file.entries[CODES].shape
        self.weights_digest = metadata.weights_digest
        self.segment = Segment(
            name=metadata.table,
            table=metadata.table,
            layer=None,
            offset=0,
            width=metadata.width,
            dtype=metadata.dtype,
            group_size=metadata.group_size,
            scale_dtype="fp32",
            scale_offset=code_bytes,
            multiplier=metadata.multiplier,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file, all three places taken together."""
        return (
            sum(self._file.entries[n].nbytes for n in (CODES, SCALES, CHECKSUMS)) // self.num_rows
        )

    def lookup(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of rows, multiplied once: `[T, width]`.

        Raises:
            CheckFailed: a row does not match its checksum; the token id is named.
        """
        codes, scales = self._file.array(CODES)[row_ids], self._file.array(SCALES)[row_ids]
        bad = tied_checksums(codes, scales, row_ids) != self._file.array(CHECKSUMS)[row_ids]
        if bad.any():
            raise CheckFailed(
                f"`{self.path}` is damaged: the row of token id {row_ids[bad][0]} does not match "
                "its checksum (T-09)",
                hint=_DAMAGED,
            )
        code_bits = bits(self.segment.dtype)
        if code_bits == 8:  # with its zero point, as narrower codes have it in a blob too
            codes ^= np.uint8(0x80)
        signed = unpack_codes(codes, bits=code_bits, width=self.segment.width)
        assert self.segment.group_size is not None
        values = dequantize_rows(signed, scales, group_size=self.segment.group_size)
        values *= np.float32(self.segment.multiplier)
        return values

    def page_runs(self, row_ids: NDArray[np.int64]) -> PageRuns:
        """The pages that rows lie on, in all three places."""
        runs: PageRuns = []
        for name in (CODES, SCALES, CHECKSUMS):
            entry = self._file.entries[name]
            runs += page_runs(row_ids, begin=entry.offset, row_bytes=entry.nbytes // self.num_rows)
        return runs

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Compare every row with its checksum.

        Raises:
            CheckFailed: names the first damaged row.
        """
        for begin in range(0, self.num_rows, _ROWS_AT_ONCE):
            ids = np.arange(begin, min(begin + _ROWS_AT_ONCE, self.num_rows))
            self.lookup(ids)
            progress(len(ids) * self.row_bytes)


def _broken(file: SafetensorsFile, what: str, hint: str = _DAMAGED) -> BlobError:
    return BlobError(f"`{file.path}`: {what}", hint=hint)


def _read_metadata(file: SafetensorsFile) -> _Metadata:
    if file.metadata.get("format") != FORMAT:
        raise _broken(file, "is a safetensors file, but none of a matrix with rows (T-02)")
    # Before the version: a damaged one must not look like a newer one.
    if header_is_damaged(file):
        raise CheckFailed(
            f"`{file.path}` is damaged: its header does not match its checksum (T-06)",
            hint=_DAMAGED,
        )
    version = file.metadata.get("version")
    if version != VERSION:
        raise _broken(
            file, f"has version {version!r}; this reader knows {VERSION} (T-03)", hint=_NEWER
        )
    try:
        metadata = msgspec.convert(file.metadata, _Metadata, strict=False)
    except msgspec.ValidationError as err:
        raise _broken(file, f"has malformed metadata: {err} (T-04)") from err
    if metadata.dtype not in CODED:
        raise _broken(
            file, f"has dtype `{metadata.dtype}`, which this reader does not know (T-04)", _NEWER
        )
    if not abs(metadata.multiplier) <= float(np.finfo(np.float32).max):
        raise _broken(file, f"has multiplier {metadata.multiplier} (T-04)")
    return metadata


def _check_tensors(file: SafetensorsFile, metadata: _Metadata) -> None:
    in_order = sorted(file.entries.values(), key=lambda entry: entry.offset)
    found = {entry.name: (entry.dtype, len(entry.shape)) for entry in in_order}
    if list(found.items()) != list(_TENSORS.items()):
        raise _broken(file, f"does not have the tensors {', '.join(_TENSORS)}, in order (T-01)")
    rows = file.entries[CODES].shape[0]
    if rows == 0:
        raise _broken(file, "has no rows (T-05)")
    expected = TiedLayout(
        weight="",
        table=metadata.table,
        rows=rows,
        width=metadata.width,
        dtype=metadata.dtype,
        group_size=metadata.group_size,
        multiplier=metadata.multiplier,
    )
    shapes = {
        HEADER_CHECKSUM: (1,),
        CODES: (rows, expected.code_bytes),
        SCALES: (rows, expected.num_groups),
        CHECKSUMS: (rows,),
    }
    for name, shape in shapes.items():
        if file.entries[name].shape != shape:
            raise _broken(
                file,
                f"has tensor `{name}` of shape {list(file.entries[name].shape)}; a row of "
                f"{metadata.width} elements in groups of {metadata.group_size} needs "
                f"{list(shape)} (T-05)",
            )
