"""Refuse weights that are no numbers, before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.adapters.adapted import AdaptedCheckpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import FLOATS, numpy_dtype
from pleexport.errors import CheckpointError
from pleexport.parallel import map_in_order

# What is compared at once; it stays in a core's cache.
_VALUES = 1 << 20
# By bits of a value, the integer that has as many.
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor; `limit` is the least magnitude that is infinite, as bits of its dtype."""

    name: str
    begin: int
    rows: NDArray[Any]
    limit: int


def bytes_to_check(matched: MatchedModel) -> int:
    """How much `check_finite` reads."""
    return sum(matched.checkpoint.entries[name].nbytes for name in _in_numbers(matched))


def check_finite(
    matched: MatchedModel, *, progress: Callable[[int], object] = lambda _: None
) -> None:
    """Read every weight that the model uses, and refuse the first that is not a finite number.

    A number that is infinite only in the dtype that config.json names is none either: the
    original rounds to it when it loads the checkpoint.

    Args:
        progress: called with the number of bytes checked since its last call.
    Raises:
        CheckpointError: names the tensor, the place and the value.
    """
    for piece, found in map_in_order(_first_bad, _pieces(matched)):
        if found is not None:
            raise _error(matched, piece, found)
        progress(piece.rows.nbytes)


def _in_numbers(matched: MatchedModel) -> Iterator[str]:
    """The tensors to look at: codes are integers, and always finite."""
    entries = matched.checkpoint.entries
    return (name for name in matched.names() if entries[name].dtype in FLOATS)


def _pieces(matched: MatchedModel) -> Iterator[_Piece]:
    checkpoint = matched.checkpoint
    for name in _in_numbers(matched):
        entry = checkpoint.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        limit = _least_infinite(entry.dtype, matched.dtype)
        count = max(1, _VALUES * rows // max(1, entry.size))
        for begin in range(0, rows, count):
            part = np.atleast_1d(checkpoint.part(name, slice(begin, begin + count)))
            yield _Piece(name, begin, part, limit)


def _least_infinite(stored: str, computed: str) -> int:
    """Bits of the least magnitude in the stored dtype that is infinite in the dtype of the config.

    Magnitudes are ordered as their bits are, and NaN is above infinity.
    """
    infinity = _bits_of(np.array(np.inf, numpy_dtype(stored)))
    rounded = partial(_is_infinite, dtype=numpy_dtype(stored), target=numpy_dtype(computed))
    low, high = 0, infinity
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rounded(middle) else (middle + 1, high)
    return low


def _is_infinite(magnitude: int, *, dtype: np.dtype[Any], target: np.dtype[Any]) -> bool:
    unsigned = _UNSIGNED[8 * dtype.itemsize]
    with np.errstate(over="ignore"):
        return bool(np.isinf(unsigned(magnitude).view(dtype).astype(target)))


def _bits_of(values: NDArray[Any]) -> int:
    return int(values.view(_UNSIGNED[8 * values.dtype.itemsize]))


def _first_bad(piece: _Piece) -> tuple[_Piece, tuple[int, ...] | None]:
    """Where in a piece the first value is that is no finite number."""
    unsigned = _UNSIGNED[8 * piece.rows.dtype.itemsize]
    magnitudes = piece.rows.view(unsigned) & unsigned(np.iinfo(unsigned).max >> 1)
    if int(magnitudes.max(initial=0)) < piece.limit:
        return piece, None
    first = int(np.argmax(magnitudes >= unsigned(piece.limit)))
    return piece, tuple(int(i) for i in np.unravel_index(first, magnitudes.shape))


def _error(matched: MatchedModel, piece: _Piece, found: tuple[int, ...]) -> CheckpointError:
    checkpoint, value = matched.checkpoint, piece.rows[found]
    entry = checkpoint.entries[piece.name]
    place = [piece.begin + found[0], *found[1:]] if entry.shape else []
    why = ""
    if math.isfinite(float(value)):  # NumPy warns of a signalling NaN
        why = f", which is infinite in the {matched.dtype} that config.json names"
    merged = isinstance(checkpoint, AdaptedCheckpoint) and piece.name in checkpoint.merged
    return CheckpointError(
        f"`{checkpoint.path}`{' with adapters merged' if merged else ''}: tensor `{piece.name}` "
        f"has {float(value):g} at {place} ({entry.dtype}){why}",
        hint="name a wider dtype in config.json, or save it again in one"
        if why
        else "the training diverged, or the file is damaged: take an earlier checkpoint, or fetch "
        "the file again",
    )
