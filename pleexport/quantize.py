"""Pure quantizers: float32 arrays in, codes and scales out.

Rows of tables are symmetric, in groups along the last axis: value = code * scale, with codes in
[-127, 127] (int8) or [-7, 7] (int4). An int8 scale is rounded up to its stored dtype before codes
are computed, so no value is clipped and each is within half a step. With 4 bits the scale is
searched for the least squared error of its group, which clips the largest values of some groups.

Dense weights are a backend's own matter, but use the same search.

What was trained for a grid of 4 bits needs no search: each group says itself what its step is.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pleexport.sizes import groups

MAX_CODE = {8: 127, 4: 7}
# By bits, shares of the scale that clips nothing. A few are enough, since the best scale for the
# codes that each leads to is computed, not searched; with 8 bits clipping never pays.
SHRINKS = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.79, 0.72)}
SMALLEST = float(np.finfo(np.float32).tiny)
# How scales are found: for the least squared error, or as those of the grid that values lie on.
Rounding = Literal["searched", "grid"]
# Values that share a step of a trained grid, and the range of its codes.
GRID_GROUP = 32
GRID_LOWEST, GRID_HIGHEST = -8, 7
# What the largest code of a group may be, by magnitude. With 8 the steps are the smallest, so it
# stands unless another leaves a fourth of the squared error: as if by chance it rarely does.
_LARGEST_CODES = (8, 7, 6, 5)
_CLEARLY_LESS = 0.25


def quantize_rows(
    values: NDArray[np.float32], *, bits: int, group_size: int, rounding: Rounding = "searched"
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantize `[..., W]` to codes `[..., W]` and scales `[..., groups]`.

    Args:
        rounding: "grid" for values that were trained for 4 bits in such groups.
    Raises:
        ValueError: a value is not finite, or too large for a float16 scale.
    """
    width = values.shape[-1]
    scales = group_scales(values, bits=bits, group_size=group_size)
    if not np.isfinite(scales).all():
        raise ValueError("values are not finite, or exceed the range of float16 scales")
    grouped, limit = grouped_values(values, group_size), float(MAX_CODE[bits])
    if bits == 4:
        found = best_scales(grouped, scales.astype(np.float32), -limit, limit, bits=bits)
        with np.errstate(under="ignore"):
            narrowed = np.minimum(found.astype(np.float16), scales)
        scales = np.where(narrowed > 0, narrowed, scales)
    lowest = -limit
    if rounding == "grid":
        scales, lowest = _grid_where_closer(grouped, scales), GRID_LOWEST
    codes = round_to_codes(grouped, scales.astype(np.float32), lowest, limit)
    codes = codes.reshape(*values.shape[:-1], -1)[..., :width]
    return codes.astype(np.int8), scales


def _grid_where_closer(
    grouped: NDArray[np.float32], searched: NDArray[np.float16]
) -> NDArray[np.float16]:
    """The scales of the grid, but for groups that lie on none: rows that nothing has trained."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        own = grid_scales(grouped).astype(np.float16)
        errors = [grid_errors(grouped, scales.astype(np.float32)) for scales in (own, searched)]
    return np.where(errors[0] <= errors[1], own, searched)


def group_scales(values: NDArray[np.float32], *, bits: int, group_size: int) -> NDArray[np.float16]:
    """The scale of each group of `[..., W]` that clips nothing: the step between two codes."""
    starts = np.arange(0, values.shape[-1], group_size)
    largest = np.maximum.reduceat(np.abs(values), starts, axis=-1)
    # In float64: a float32 quotient of the smallest numbers would underflow to a scale of zero.
    return round_up_to_float16(largest.astype(np.float64) / MAX_CODE[bits])


def round_up_to_float16(values: NDArray[np.float64]) -> NDArray[np.float16]:
    """The smallest float16 numbers that are not below `values` (>= 0)."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16)
    low = rounded < values
    return np.where(low, np.nextafter(rounded, np.float16(np.inf)), rounded)


def best_scales(
    values: NDArray[np.float32],
    widest: NDArray[np.float32],
    lowest: NDArray[np.float32] | float,
    highest: NDArray[np.float32] | float,
    *,
    bits: int,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """For each group of `[..., groups, G]`, the scale of least squared error among a few.

    For the codes c that a scale leads to, the best scale has a closed form, sum(x c) / sum(c c),
    and takes sum(x c)**2 / sum(c c) off the squared error. All sums are weighted by importance.

    Args:
        widest: `[..., groups]`, the scales that clip nothing.
        lowest, highest: the range of codes, zero point taken off; broadcast over groups.
        importance: `[groups, G]`, above zero; all alike by default.
    """
    best_gain = np.full(widest.shape, -1, dtype=np.float32)
    best = np.zeros(widest.shape, dtype=np.float32)
    codes = np.empty_like(values)
    weighted = values if importance is None else values * importance
    for shrink in SHRINKS[bits]:
        round_to_codes(values, widest * np.float32(shrink), lowest, highest, out=codes)
        product = np.einsum("...g,...g->...", weighted, codes)
        counted = codes if importance is None else codes * importance
        square = np.maximum(np.einsum("...g,...g->...", counted, codes), np.float32(SMALLEST))
        gain = product * product / square
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best, product / square, where=better)
    return best


def grid_scales(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The steps of a trained grid of 4 bits: one for each group of `[..., groups, G]`, signed.

    That of Q4_0 gives the largest value by magnitude the code -8. Where all codes of a group are
    smaller, the step that fits far better is a seventh, sixth or fifth of that value. Values were
    rounded when they were stored, the largest too: the scale that fits all codes best is nearest to
    the trained one.

    Source: ggml `quantize_row_q4_0_ref`.
    """
    top, bottom = values.max(axis=-1), values.min(axis=-1)
    largest: NDArray[np.float32] = np.where(top > -bottom, top, bottom)
    best: NDArray[np.float32] = largest / np.float32(-_LARGEST_CODES[0])
    least = grid_errors(values, best)
    for code in _LARGEST_CODES[1:]:
        scales = largest / np.float32(-code)
        errors = grid_errors(values, scales)
        better = errors < least * np.float32(_CLEARLY_LESS)
        np.copyto(best, scales, where=better)
        np.copyto(least, errors, where=better)
    codes = round_to_codes(values, best, GRID_LOWEST, GRID_HIGHEST)
    square = np.maximum(np.einsum("...g,...g->...", codes, codes), np.float32(SMALLEST))
    fitting: NDArray[np.float32] = np.einsum("...g,...g->...", values, codes) / square
    return fitting


def grid_errors(values: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The squared error of each group of `[..., groups, G]` in codes of a trained grid."""
    rounded = round_to_codes(values, scales, GRID_LOWEST, GRID_HIGHEST)
    with np.errstate(over="ignore"):  # an infinite error is the largest
        errors: NDArray[np.float32] = np.square(rounded * scales[..., None] - values).sum(axis=-1)
    return errors


def round_to_codes(
    values: NDArray[np.float32],
    scales: NDArray[np.float32],
    lowest: NDArray[np.float32] | float,
    highest: NDArray[np.float32] | float,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The nearest codes of `[..., groups, G]`; a scale too small to divide by gives zeros."""
    usable = np.abs(scales) > SMALLEST
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    out = np.multiply(values, inverse[..., None], out=out)
    np.rint(out, out=out)
    np.clip(out, lowest, highest, out=out)
    return out


def grouped_importance(importance: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """The importance `[K]` of a matrix's inputs as `best_scales` takes it, `[groups, G]`.

    Relative, so that nothing underflows. Inputs that a text never moved still count a little.
    """
    relative = importance / max(float(importance.mean()), SMALLEST) + 1e-4
    return grouped_values(relative.astype(np.float32), group_size)


def grouped_values(values: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """`[..., W]` as `[..., groups, group_size]`, padded with zeros."""
    width = values.shape[-1]
    count = groups(width, group_size)
    if width % group_size:
        padded = np.zeros((*values.shape[:-1], count * group_size), dtype=np.float32)
        padded[..., :width] = values
        values = padded
    return values.reshape(*values.shape[:-1], count, group_size)
