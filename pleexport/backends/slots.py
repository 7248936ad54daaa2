"""How many slots of its caches a text uses, for graphs that write them in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pleexport.contract import GraphContract
from pleexport.dtypes import numpy_dtype
from pleexport.errors import BundleError
from pleexport.sizes import align

_FIRST_POSITIONS = 256


class Slots:
    """The slots of each cache that a graph is told of; lists are in the contract's order.

    They double with the text, since a graph may look at all of them. Those of window layers grow up
    to the size of their ring, which is reached before a position wraps around.

    Args:
        context: largest number of positions.
        chunk: most tokens of one call.
    """

    def __init__(self, contract: GraphContract, *, context: int, chunk: int) -> None:
        windows = [cache.window for cache in contract.caches if cache.window is not None]
        # A chunk's first token must still find its window after the whole chunk was written.
        ring = min(max(windows, default=1) + chunk - 1, context)
        self._caches = contract.caches
        self._most = [context if c.window is None else ring for c in contract.caches]
        self._positions = 0

    def allocate(self) -> list[NDArray[Any]]:
        """Zeros for the whole context: masked slots must hold finite numbers.

        This is address space, of which nothing is in memory until it is used.

        Raises:
            BundleError: there is not so much of it.
        """
        try:
            return [
                np.zeros(
                    [n if isinstance(n, int) else align(most, cache.block) for n in cache.shape],
                    dtype=numpy_dtype(cache.dtype),
                )
                for cache, most in zip(self._caches, self._most, strict=True)
            ]
        except (MemoryError, ValueError) as err:  # NumPy says so of what no array can have
            raise BundleError(
                f"this process cannot have caches for {max(self._most):,} positions",
                hint="build with a smaller `--context`",
            ) from err

    def grow(self, positions: int) -> list[int] | None:
        """Room for a text of `positions`: the slots of each cache, or None if they stay."""
        if positions <= self._positions:
            return None
        self._positions = max(_FIRST_POSITIONS, 2 * self._positions, positions)
        return [
            align(min(self._positions, most), cache.block)
            for cache, most in zip(self._caches, self._most, strict=True)
        ]
