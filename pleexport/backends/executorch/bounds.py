"""The largest sizes of a program's dynamic dimensions: memory is planned for them."""

from __future__ import annotations

from pleexport.contract import (
    CONTEXT_CAPACITY,
    NUM_LOGITS,
    TOKENS,
    WINDOW_CAPACITY,
    GraphContract,
)
from pleexport.sizes import align

# More are no faster, and scores of more take more memory.
TOKENS_PER_CALL = 256
# Logits of E2B take a megabyte a position, and every layer that shares keys works on so many.
LOGITS_PER_CALL = 16


def bounds(contract: GraphContract, *, context: int) -> dict[str, int]:
    """By dynamic dimension, the largest size."""
    found = {TOKENS: TOKENS_PER_CALL, NUM_LOGITS: LOGITS_PER_CALL}
    for cache in contract.caches:
        if cache.window is None:
            found[CONTEXT_CAPACITY] = align(context, cache.block)
        else:
            ring = min(cache.window, context) - 1 + TOKENS_PER_CALL
            found[WINDOW_CAPACITY] = max(found.get(WINDOW_CAPACITY, 0), ring)
    return found
