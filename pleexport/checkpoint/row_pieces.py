"""Compute rows in pieces that begin at the same places whatever is asked for.

A product of matrices may round a row otherwise among other rows, so that rows which are computed
twice would differ in their last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pleexport.model import Rows

PIECE_ROWS = 64


def compute_rows(
    compute: Callable[[slice], NDArray[np.float32]], rows: Rows, *, count: int
) -> NDArray[np.float32]:
    """Rows `[n, ...]`, each computed in the piece of `PIECE_ROWS` rows that it belongs to.

    Args:
        compute: given a piece, its values; the last piece may be shorter.
        rows: which of them.
        count: how many rows there are.
    """
    wanted = np.arange(*rows.indices(count)) if isinstance(rows, slice) else rows
    pieces, piece_of = np.unique(wanted // PIECE_ROWS, return_inverse=True)
    order = np.argsort(piece_of, kind="stable")
    bounds = np.searchsorted(piece_of[order], np.arange(len(pieces) + 1))
    found = None
    for i, piece in enumerate(pieces.tolist()):
        values = compute(slice(piece * PIECE_ROWS, min((piece + 1) * PIECE_ROWS, count)))
        if found is None:
            found = np.empty((len(wanted), *values.shape[1:]), np.float32)
        mine = order[bounds[i] : bounds[i + 1]]
        found[mine] = values[wanted[mine] % PIECE_ROWS]
    return compute(slice(0, 0)) if found is None else found
