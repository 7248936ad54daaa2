"""Merge what adapters change into a tensor, in float32, for the rows and columns that are read.

A merged tensor is never in memory as a whole: only the adapter's own matrices are, and what a row
or a column is normalised by. Sources: peft 0.21 `tuners/lora/layer.py`, `tuners/lora/dora.py`,
`tuners/trainable_tokens/layer.py`; transformers `_init_added_embeddings_weights_with_mean`.

Shape suffixes: V rows, K columns, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.checkpoint import cut
from pleexport.checkpoint.row_pieces import PIECE_ROWS, compute_rows
from pleexport.dtypes import numpy_dtype
from pleexport.model import Rows
from pleexport.safetensors_file import TensorEntry

_ALL = slice(None)
# Numbers of a tensor that are in memory at a time where all of it is looked through.
_NUMBERS_AT_ONCE = 1 << 18


class Values(Protocol):
    """A tensor whose parts can be read."""

    shape: tuple[int, ...]

    def read(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """A part of it in float32."""
        ...


class Stored:
    """A tensor of a file, rounded to a checkpoint's dtype, as the original does when it loads it.

    Args:
        source: what has tensors by name: a checkpoint or a file of weights.
        name: of the tensor.
        dtype: the checkpoint's, e.g. "bf16".
    """

    def __init__(self, source: Any, name: str, *, dtype: str) -> None:
        self._source, self.name, self._dtype = source, name, numpy_dtype(dtype)
        self.shape: tuple[int, ...] = source.entries[name].shape

    def read(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """See `Values`."""
        part = cut(self._source.array(self.name), rows, columns)
        values: NDArray[np.float32] = part.astype(self._dtype, copy=False).astype(np.float32)
        return values


class WithProduct:
    """A tensor with the product of two small matrices added: LoRA, or DoRA with a magnitude.

    Args:
        base: `[V, K]`.
        left_VR, right_RK: any floating-point dtype; computed with in float32.
        scale: of the product.
        delta_dtype: what the product is rounded to before it is added, as PEFT does for lookups.
        magnitude: the norm that each row gets, `[V, 1]`, or each column, `[1, K]`; None for LoRA.
    """

    def __init__(
        self,
        base: Values,
        left_VR: NDArray[Any],
        right_RK: NDArray[Any],
        *,
        scale: float,
        delta_dtype: str = "fp32",
        magnitude: NDArray[np.float32] | None = None,
    ) -> None:
        self.shape = base.shape
        self._base, self._left_VR, self._right_RK = base, left_VR, right_RK
        self._scale = np.float32(scale)
        self._delta_dtype = numpy_dtype(delta_dtype)
        self._magnitude = magnitude

    def read(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """See `Values`."""
        summed = self._sum(rows, columns)
        if self._magnitude is not None:
            factor = self._factor
            summed *= factor[rows] if factor.shape[1] == 1 else factor[:, columns]
        return summed

    def _sum(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        left = self._left_VR[rows].astype(np.float32)
        delta = left @ self._right_RK[:, columns].astype(np.float32) * self._scale
        delta = delta.astype(self._delta_dtype, copy=False)
        summed: NDArray[np.float32] = self._base.read(rows, columns) + delta.astype(np.float32)
        return summed

    @cached_property
    def _factor(self) -> NDArray[np.float32]:
        """What each row or column is multiplied by, so that it has its magnitude for a norm."""
        assert self._magnitude is not None
        by_row = self._magnitude.shape[1] == 1
        squares = np.zeros(self._magnitude.shape, np.float64)
        for rows in _blocks(self.shape):
            squared = np.square(self._sum(rows, _ALL), dtype=np.float64)
            if by_row:
                squares[rows] = squared.sum(axis=1, keepdims=True)
            else:
                squares += squared.sum(axis=0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is named later
            factor = self._magnitude / np.sqrt(squares, dtype=np.float64).astype(np.float32)
        return factor.astype(np.float32)


class WithAddend:
    """A vector with another one added: the bias of LoRA's second matrix."""

    def __init__(self, base: Values, addend: NDArray[np.float32]) -> None:
        self.shape = base.shape
        self._base, self._addend = base, addend

    def read(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """See `Values`."""
        summed: NDArray[np.float32] = self._base.read(rows, columns) + self._addend[rows]
        return summed


class WithRows:
    """A table, some of whose rows are others.

    Args:
        ids: of the rows, each once.
        rows: their values `[n, K]`.
        dtype: the checkpoint's, which they are rounded to.
    """

    def __init__(self, base: Values, ids: Sequence[int], rows: NDArray[Any], *, dtype: str) -> None:
        self.shape = base.shape
        self._base = base
        self._ids = np.array(ids, np.int64)
        self._rows = rows.astype(numpy_dtype(dtype)).astype(np.float32)

    def read(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """See `Values`."""
        values = self._base.read(rows, columns)
        begin, end, _ = rows.indices(self.shape[0])
        mine = (self._ids >= begin) & (self._ids < end)
        values[self._ids[mine] - begin] = self._rows[mine][:, columns]
        return values


class Resized:
    """A table with fewer rows, or more: these have the mean of all that it had.

    It is what `resize_token_embeddings` gives added tokens, but for noise of 3e-5 deviations.

    Args:
        rows: how many it has then.
        dtype: the checkpoint's, which the mean is rounded to.
    """

    def __init__(self, base: Values, rows: int, *, dtype: str) -> None:
        self.shape = (rows, *base.shape[1:])
        self._base, self._dtype = base, numpy_dtype(dtype)

    def read(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """See `Values`."""
        begin, end, _ = rows.indices(self.shape[0])
        old = self._base.shape[0]
        values = self._base.read(slice(begin, min(end, old)), columns)
        added = max(0, end - max(begin, old))
        if not added:
            return values
        return np.concatenate([values, np.repeat(self._mean[:, columns], added, axis=0)])

    @cached_property
    def _mean(self) -> NDArray[np.float32]:
        count = self._base.shape[0]
        total = np.zeros((1, self.shape[1]), np.float64)
        for rows in _blocks(self._base.shape):
            part = self._base.read(rows, _ALL)
            total += part.sum(axis=0, dtype=np.float64, keepdims=True)
        mean: NDArray[np.float32] = (total / count).astype(self._dtype).astype(np.float32)
        return mean


@dataclass(frozen=True)
class MergedTensor:
    """A tensor under the name that a checkpoint has for it, rounded once to the checkpoint's dtype.

    Attributes:
        name: in the merged checkpoint.
        values: what it holds.
        dtype: of the checkpoint.
    """

    name: str
    values: Values
    dtype: str

    @property
    def entry(self) -> TensorEntry:
        """Its shape and dtype; it lies in no file."""
        shape = self.values.shape
        nbytes = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize
        return TensorEntry(self.name, self.dtype, shape, 0, nbytes)

    def part(self, rows: Rows, columns: slice) -> NDArray[Any]:
        """Rows, and columns, in the checkpoint's dtype; a row is the same among any others."""

        def compute(piece: slice) -> NDArray[np.float32]:
            # What is too large becomes infinite, and whoever takes the values names it.
            with np.errstate(over="ignore", invalid="ignore"):
                return self.values.read(piece, columns)

        found = compute_rows(compute, rows, count=self.values.shape[0])
        with np.errstate(over="ignore"):
            rounded: NDArray[Any] = found.astype(numpy_dtype(self.dtype), copy=False)
        return rounded


def same_values(one: Values, other: Values) -> bool:
    """Whether two tensors hold the same numbers; of each, a part at a time is in memory."""
    if one.shape != other.shape:
        return False
    blocks = _blocks(one.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(np.array_equal(one.read(b, _ALL), other.read(b, _ALL)) for b in blocks)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor, in blocks of about `_NUMBERS_AT_ONCE` numbers."""
    step = max(PIECE_ROWS, _NUMBERS_AT_ONCE // max(1, math.prod(shape[1:])))
    return (slice(begin, begin + step) for begin in range(0, shape[0], step))
