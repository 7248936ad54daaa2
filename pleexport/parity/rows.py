"""Do the rows of a blob hold what the checkpoint's tables hold? Every row is read back.

Shape suffixes: N token ids, L layers, 1 for a table that belongs to none, W width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import bits
from pleexport.model import Table
from pleexport.parity.report import TableCheck
from pleexport.quantize import group_scales
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import Segment

_BATCH_BYTES = 8 << 20
# Beside what rounding to nearest does to a value: float32's own rounding of code, scale and
# multiplier stays far inside.
_SLACK = 1e-3
# A stored scale is a float16, which moves every value by up to this share of itself.
_SCALE_ROUNDING = 2.0**-11
# A row of zeros has no step; nothing is divided by less.
_SMALLEST_STEP = 1e-38
# By narrower float, the distance of neighbours as a share of the value, and the least distance.
_FLOAT_STEPS = {"fp16": (2.0**-10, 2.0**-24), "bf16": (2.0**-7, _SMALLEST_STEP)}


@dataclass(frozen=True)
class _Batch:
    """What some rows of a table show.

    Attributes:
        max_error, max_steps: as in `TableCheck`.
        first_bad: token id and layer of the first vector that is not what it should be.
    """

    max_error: float
    max_steps: float | None
    first_bad: tuple[int, int] | None


def check_table(
    blob: Blob,
    *,
    matched: MatchedModel,
    table: Table,
    lossless: bool,
    progress: Callable[[int], object] = lambda _: None,
) -> TableCheck:
    """Read every row of one table back through the reader and compare it with the source.

    Args:
        lossless: hold the rows to the source bit for bit, and else to what rounding may do.
        progress: called with the number of rows checked since its last call.
    """
    segment = next(s for s in blob.segments if s.table == table.name)
    tied = blob.tied_table == table.name
    batches = []
    for ids in _batches(blob.num_rows, table.row_width):
        batches.append(
            _check_batch(
                ids,
                _source(matched, table, ids),
                _stored(blob, table, ids),
                multiplier=np.float32(table.multiplier),
                rounding=None if lossless else segment,
                tied=tied,
            )
        )
        progress(len(ids))
    first_bad = next((b.first_bad for b in batches if b.first_bad is not None), None)
    steps = [b.max_steps for b in batches if b.max_steps is not None]
    return TableCheck(
        table=table.name,
        dtype=segment.dtype,
        lossless=lossless,
        rows=blob.num_rows,
        max_error=float(np.max([b.max_error for b in batches], initial=0.0)),
        max_steps=None if lossless else float(np.max(steps, initial=0.0)),
        first_bad_row=first_bad[0] if first_bad else None,
        first_bad_layer=first_bad[1] if first_bad and table.layers is not None else None,
        tied=tied,
    )


def _check_batch(
    ids: NDArray[np.int64],
    expected_NLW: NDArray[np.float32],
    got_NLW: NDArray[np.float32],
    *,
    multiplier: np.float32,
    rounding: Segment | None,
    tied: bool,
) -> _Batch:
    """Compare looked-up vectors with the source's.

    Args:
        multiplier: the model's, not the blob's, which may be wrong. It is in `got_NLW` only.
        rounding: how they were rounded; None where they must be equal bit for bit.
        tied: they were rounded as a matrix, whose scales are searched with 8 bits too.
    """
    difference_NLW = np.abs(got_NLW - expected_NLW * multiplier)
    max_error = float(difference_NLW.max())
    # Comparisons are turned around so that a NaN is bad too.
    if rounding is None:
        return _Batch(max_error, None, _first(~(difference_NLW.max(axis=-1) == 0), ids))
    steps_NLW = (_matrix_steps if tied else _quantization_steps)(expected_NLW, rounding)
    in_steps_NLW = difference_NLW / np.abs(steps_NLW * multiplier)
    if tied or rounding.dtype == "int4":
        bad_NL = _further_than_nearest(expected_NLW, got_NLW / multiplier, steps_NLW, rounding)
    else:
        bad_NL = ~(in_steps_NLW.max(axis=-1) <= 0.5 + _SLACK)
    return _Batch(max_error, float(in_steps_NLW.max()), _first(bad_NL, ids))


def _batches(num_rows: int, row_width: int) -> Iterator[NDArray[np.int64]]:
    """All token ids, as many at a time as fit `_BATCH_BYTES` in float32."""
    step = max(1, _BATCH_BYTES // (4 * row_width))
    for begin in range(0, num_rows, step):
        yield np.arange(begin, min(begin + step, num_rows))


def _source(matched: MatchedModel, table: Table, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """What a checkpoint's table holds for token ids, `[N, L, W]`, multiplier not applied."""
    rows = matched.row_values(table, table.source_rows(ids))
    return rows.reshape(len(ids), table.layers or 1, table.width)


def _stored(blob: Blob, table: Table, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the reader makes of the rows of token ids, `[N, L, W]`, multiplier applied.

    Rows are read as they lie, also those of ids that a runner replaces by others.
    """
    return blob.lookup(ids)[table.name].reshape(len(ids), table.layers or 1, table.width)


def _first(bad_NL: NDArray[np.bool_], ids: NDArray[np.int64]) -> tuple[int, int] | None:
    """Token id and layer of the first True."""
    if not bad_NL.any():
        return None
    row, layer = np.argwhere(bad_NL)[0]
    return int(ids[row]), int(layer)


def _quantization_steps(expected_NLW: NDArray[np.float32], segment: Segment) -> NDArray[np.float32]:
    """By element, the distance between neighbouring codes, from the source alone."""
    if segment.group_size is None:
        share, least = _FLOAT_STEPS[segment.dtype]
        return np.maximum(np.abs(expected_NLW) * np.float32(share), np.float32(least))
    code_bits = bits(segment.dtype)
    scales = group_scales(expected_NLW, bits=code_bits, group_size=segment.group_size)
    steps = np.repeat(scales.astype(np.float32), segment.group_size, axis=-1)
    return np.maximum(steps[..., : expected_NLW.shape[-1]], np.float32(_SMALLEST_STEP))


def _matrix_steps(expected_NLW: NDArray[np.float32], segment: Segment) -> NDArray[np.float32]:
    """By element, the distance between neighbouring codes of a matrix, from the source alone.

    The value of largest magnitude gets the lowest code, so steps may be negative.
    """
    width, size = expected_NLW.shape[-1], segment.group_size or 1
    starts = np.arange(0, width, size)
    top = np.maximum.reduceat(expected_NLW, starts, axis=-1)
    bottom = np.minimum.reduceat(expected_NLW, starts, axis=-1)
    largest = np.where(top > -bottom, -top, -bottom)
    steps = np.repeat(largest, size, axis=-1)[..., :width] / np.float32(
        2 ** (bits(segment.dtype) - 1)
    )
    usable = np.abs(steps) > _SMALLEST_STEP
    return np.where(usable, steps, np.float32(_SMALLEST_STEP)).astype(np.float32, copy=False)


def _further_than_nearest(
    expected_NLW: NDArray[np.float32],
    got_NLW: NDArray[np.float32],
    steps_NLW: NDArray[np.float32],
    segment: Segment,
) -> NDArray[np.bool_]:
    """`[N, L]`: whether a group of values is further off than rounding to nearest.

    Where scales are searched for, single values may be more than half a step off, and the group as
    a whole is closer for it.
    """
    starts = np.arange(0, expected_NLW.shape[-1], segment.group_size or 1)
    highest = 2 ** (bits(segment.dtype) - 1) - 1
    codes = np.minimum(np.rint(expected_NLW / steps_NLW), highest)
    nearest = codes * steps_NLW - expected_NLW
    error, bound, size = (
        np.sqrt(np.add.reduceat(np.square(values), starts, axis=-1))
        for values in (got_NLW - expected_NLW, nearest, expected_NLW)
    )
    close: NDArray[np.bool_] = error <= bound * (1 + _SLACK) + size * _SCALE_ROUNDING
    return ~np.asarray(close.all(axis=-1))
