"""Predict what rounding a matrix or a table costs, in nats per token, before anything is written.

Costs add up: each is a KL divergence of the second order, see `gradients`. Without a text, a matrix
or a table of a kind is taken to matter as much as it did in the models that were measured
(docs/quantization.md), and its own values tell how far rounding moves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.matching import MatchedModel
from pleexport.codes import dequantize_rows
from pleexport.dtypes import QUANTIZED, bits
from pleexport.export.segments import table_group_size
from pleexport.model import Model, Table, Weight
from pleexport.quantize import (
    best_scales,
    grouped_importance,
    grouped_values,
    quantize_rows,
    round_to_codes,
)
from pleexport.weights import BLOCK_SIZES

if TYPE_CHECKING:
    from pleexport.export.gradients import Gradients

# Nats per token where the squared error is as large as the squared values: of the head, of all
# other matrices together, of a table that belongs to no layer, and of one that belongs to layers.
_HEAD, _MATRICES, _MAIN_TABLE, _LAYERS_TABLE = 0.7, 0.4, 0.25, 0.15
# Rows that stand for a matrix, and for a table: errors of a percent or two in what is predicted.
_MATRIX_ROWS: Final = 64
_TABLE_ROWS: Final = 512
# Float16 scales hold rows of this size.
_LARGEST: Final = 1e5


class Sensitivity(Protocol):
    """Nats per token that storing something in int8 or int4 costs."""

    def matrix(self, weight: Weight, dtype: str, *, block_size: int) -> float:
        """Of a matrix with at most so many weights to a scale."""
        ...

    def table(self, table: Table, dtype: str) -> float:
        """Of a table."""
        ...


class TypicalSensitivity:
    """What follows from names and shapes: values are taken to be normally distributed."""

    def __init__(self, model: Model) -> None:
        self._matrices = sum(w.precision in ("quantizable", "sensitive") for w in model.weights)

    def matrix(self, weight: Weight, dtype: str, *, block_size: int) -> float:
        """See `Sensitivity`."""
        share = _HEAD if weight.precision == "head" else _MATRICES / self._matrices
        return share * self._of_matrix(weight, dtype, _group_size(weight, block_size))

    def table(self, table: Table, dtype: str) -> float:
        """See `Sensitivity`."""
        share = _MAIN_TABLE if table.layers is None else _LAYERS_TABLE
        return share * self._of_table(table, dtype, table_group_size(table, dtype))

    def _of_matrix(self, weight: Weight, dtype: str, group: int) -> float:
        """The squared error, as a share of the squared values."""
        return _of_normal_values(_block_errors, dtype, group)

    def _of_table(self, table: Table, dtype: str, group: int) -> float:
        """The same of a table."""
        return _of_normal_values(_row_errors, dtype, group)


class SampledSensitivity(TypicalSensitivity):
    """As above, with the errors of a sample of each matrix's and each table's own rows."""

    def __init__(self, matched: MatchedModel) -> None:
        super().__init__(matched.model)
        self._matched = matched

    def _of_matrix(self, weight: Weight, dtype: str, group: int) -> float:
        rows = _spread(weight.shape[0], _MATRIX_ROWS)
        return _relative(_matrix_rows(self._matched, weight, rows), _block_errors, dtype, group)

    def _of_table(self, table: Table, dtype: str, group: int) -> float:
        values = self._matched.row_values(table, _spread(table.rows, _TABLE_ROWS))
        return _relative(values.reshape(-1, table.width), _row_errors, dtype, group)


class MeasuredSensitivity:
    """What a text tells: gradients, inputs, and the errors that meet them.

    Args:
        token_ids: of the text.
        measure: gives the gradients; called once, when they are first needed.
    """

    def __init__(
        self, matched: MatchedModel, token_ids: Sequence[int], measure: Callable[[], Gradients]
    ) -> None:
        self._matched = matched
        self._ids = np.asarray(token_ids, dtype=np.int64)[:_TABLE_ROWS]
        self._measure = measure

    @functools.cached_property
    def _gradients(self) -> Gradients:
        return self._measure()

    def matrix(self, weight: Weight, dtype: str, *, block_size: int) -> float:
        """See `Sensitivity`; of rows with larger gradients, more are looked at."""
        outputs = self._gradients.outputs.get(weight.name)
        if outputs is None or not outputs.sum():
            return 0.0
        inputs = self._gradients.inputs[weight.name]
        places = (np.arange(_MATRIX_ROWS) + 0.5) / _MATRIX_ROWS
        sums = np.cumsum(outputs) / outputs.sum()
        rows = np.minimum(np.searchsorted(sums, places), len(outputs) - 1)
        values = _matrix_rows(self._matched, weight, rows)
        group = _group_size(weight, block_size)
        errors = _block_errors(values, dtype, group, inputs.astype(np.float32))
        return float(0.5 * (errors.astype(np.float64) ** 2 @ inputs).mean())

    def table(self, table: Table, dtype: str) -> float:
        """See `Sensitivity`; the rows are those of the text's first tokens."""
        squares = self._gradients.vectors.get(table.name)
        if squares is None:
            return 0.0
        aliases = self._matched.model.row_aliases
        ids = np.array([aliases.get(int(i), int(i)) for i in self._ids], dtype=np.int64)
        rows = self._matched.row_values(table, table.source_rows(ids))
        errors = _row_errors(rows.reshape(-1, table.width), dtype, table_group_size(table, dtype))
        mean = (errors.astype(np.float64) ** 2).reshape(len(ids), -1).mean(0)
        return float(0.5 * (squares @ mean))


def _group_size(weight: Weight, block_size: int) -> int:
    """Weights that share a scale, about as backends have it: a block that divides a row."""
    inputs = weight.shape[1]
    return next((b for b in reversed(BLOCK_SIZES) if b <= block_size and inputs % b == 0), 16)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` rows of `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _matrix_rows(
    matched: MatchedModel, weight: Weight, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Some rows of a matrix, `[n, K]`."""
    return np.concatenate([matched.read(weight, slice(row, row + 1)) for row in rows.tolist()])


_Errors = Callable[[NDArray[np.float32], str, int], NDArray[np.float32]]


def _relative(values: NDArray[np.float32], errors: _Errors, dtype: str, group: int) -> float:
    """The squared error, as a share of the squared values."""
    values = _storable(values)
    total = float((values.astype(np.float64) ** 2).sum())
    lost = float((errors(values, dtype, group).astype(np.float64) ** 2).sum())
    return lost / total if total else 0.0


@functools.cache
def _of_normal_values(errors: _Errors, dtype: str, group: int) -> float:
    """The relative squared error of normally distributed values."""
    values = np.random.default_rng(0).standard_normal((_TABLE_ROWS, group), dtype=np.float32)
    return _relative(values, errors, dtype, group)


def _storable(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values that can be rounded: what cannot is refused where it would be written."""
    return np.clip(np.nan_to_num(values), -_LARGEST, _LARGEST)


def _block_errors(
    values: NDArray[np.float32],
    dtype: str,
    group: int,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """What rounding moves rows of a matrix by, `[n, K]`; zero points are in the middle."""
    assert dtype in QUANTIZED, dtype
    values = _storable(values)
    grouped = grouped_values(values, group)
    top, bottom, middle = grouped.max(-1), grouped.min(-1), float(1 << (bits(dtype) - 1))
    widest = np.where(top > -bottom, top, bottom) / np.float32(-middle)
    scales = best_scales(
        grouped,
        widest,
        -middle,
        middle - 1,
        bits=bits(dtype),
        importance=None if importance is None else grouped_importance(importance, group),
    )
    codes = round_to_codes(grouped, scales, -middle, middle - 1)
    moved: NDArray[np.float32] = codes * scales[..., None] - grouped
    return moved.reshape(len(values), -1)[:, : values.shape[1]]


def _row_errors(values: NDArray[np.float32], dtype: str, group: int) -> NDArray[np.float32]:
    """What rounding moves rows of a table by, `[n, W]`."""
    values = _storable(values)
    codes, scales = quantize_rows(values, bits=bits(dtype), group_size=group)
    return dequantize_rows(codes, scales, group_size=group) - values
