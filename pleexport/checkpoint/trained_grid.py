"""Recognise what was trained for 4 bits and is stored as plain numbers, by its values.

Quantization-aware training for llama.cpp's Q4_0 leaves groups of 32 values that lie close to 16
evenly spaced ones, of which the largest by magnitude is the lowest. They are not on them exactly:
bfloat16 holds a scale times a code with 8 bits. Other matrices lie anywhere between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.matching import MatchedModel
from pleexport.model import Table, Weight
from pleexport.quantize import GRID_GROUP, SMALLEST, grid_errors, grid_scales, grouped_values

# Distances below it are those of a trained grid: numbers of bfloat16 on one have 0.01 to 0.03, and
# weights that were not trained for it 0.86 to 1.07, in 64 groups of whatever distribution.
ON_GRID = 0.4
# Few rows are enough, and each may cost the disk a page or two: 1,024 values show 32 groups.
_ROWS = 2
_TABLE_ROWS = 16
_COLUMNS = 1024
_NAME = "q4_0"


def mark_grids(matched: MatchedModel) -> MatchedModel:
    """The same model, with its matrices and tables marked that were trained for a grid of 4 bits.

    Reads a few rows of each.
    """
    model = matched.model
    tables = tuple(replace(t, on_grid=_table_on_grid(matched, t)) for t in model.tables)
    weights = tuple(replace(w, on_grid=_matrix_on_grid(matched, w)) for w in model.weights)
    return MatchedModel(replace(model, tables=tables, weights=weights), matched.checkpoint)


def notes_on_grids(matched: MatchedModel) -> list[str]:
    """What was recognised, in a sentence; or that a name promises what the values do not hold."""
    matrices = [weight for weight in matched.model.weights if weight.precision != "full"]
    kinds: dict[str, Sequence[Table | Weight]] = {
        "matrices": matrices,
        "tables": matched.model.tables,
    }
    found = [
        f"{sum(item.on_grid for item in items)} of {len(items)} {kind}"
        for kind, items in kinds.items()
        if any(item.on_grid for item in items)
    ]
    if found:
        return [
            f"{' and '.join(found)} lie on a grid of 4 bits in groups of {GRID_GROUP}, as trained "
            "for Q4_0; they are stored on it unless a target, dtype or block size asks otherwise"
        ]
    if _NAME in matched.checkpoint.name.lower():
        return [
            f"the name says {_NAME}, but no matrix lies on a grid of 4 bits; `--block-size "
            f"{GRID_GROUP}` is for matrices that were trained for it and are stored unrounded"
        ]
    return []


def grid_distance(values: NDArray[np.float32]) -> float:
    """How far values `[..., W]` lie from a grid of 4 bits in groups of `GRID_GROUP`.

    The root mean square of the distance in steps, divided by that of numbers which lie anywhere
    between two steps, 1 / sqrt(12). Zeros say nothing: they are on every grid. NaN for zeros only.
    """
    groups = grouped_values(values.reshape(-1, values.shape[-1]), GRID_GROUP)
    scales = grid_scales(groups)
    usable = np.abs(scales) > SMALLEST
    if not usable.any():
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):  # no grid has values whose squares overflow
        in_steps = grid_errors(groups[usable], scales[usable]) / np.square(scales[usable])
    counted = np.count_nonzero(groups[usable])
    return float(np.sqrt(12 * in_steps.sum(dtype=np.float64) / counted))


def _matrix_on_grid(matched: MatchedModel, weight: Weight) -> bool:
    if weight.precision == "full" or weight.codes or weight.constant is not None:
        return False
    # A few rows of a transposed matrix would be every page of it; Q4_0 has no such files.
    if weight.transposed or len(weight.shape) != 2 or weight.shape[1] % GRID_GROUP:
        return False
    rows = (slice(i, i + 1) for i in _spread(weight.shape[0], _ROWS))
    return _close(np.concatenate([matched.read(weight, row, slice(0, _COLUMNS)) for row in rows]))


def _table_on_grid(matched: MatchedModel, table: Table) -> bool:
    if table.codes or table.fold or table.width % GRID_GROUP:
        return False
    return _close(matched.row_values(table, _spread(table.rows, _TABLE_ROWS)))


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    """A few of `count` indices, away from both ends."""
    return np.unique((np.arange(wanted) * 2 + 1) * count // (2 * wanted))


def _close(values: NDArray[np.float32]) -> bool:
    if not np.isfinite(values).all():
        return False  # a build names the tensor
    return grid_distance(values) < ON_GRID
