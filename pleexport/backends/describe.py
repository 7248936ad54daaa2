"""The contract of a model's dense graph, computed once: traced from, stored, and checked."""

from __future__ import annotations

import msgspec

from pleexport.backends.base import Backend, Conventions
from pleexport.contract import (
    ALL_TOKENS,
    CONTEXT_CAPACITY,
    TOKENS,
    WINDOW_CAPACITY,
    CacheInput,
    GraphContract,
    LookupInput,
    StateInput,
)
from pleexport.model import Cache, CacheBuffer, Model, Table


def describe(model: Model, backend: Backend, *, context: int) -> GraphContract:
    """The contract of a model's dense graph, as a backend writes it for so many positions."""
    conventions = backend.conventions
    contract = GraphContract(
        id=conventions.contract_id,
        lookup_inputs=[LookupInput(t.graph_input, t.name, _lookup_shape(t)) for t in model.tables],
        caches=[
            CacheInput(
                input=buffer.input,
                output=buffer.output,
                layer=cache.layer,
                shape=_cache_shape(cache, buffer, conventions),
                dtype=buffer.dtype,
                block=cache.block,
                window=cache.window,
                shared_outputs=list(buffer.shared_outputs) if model.processor == "gpu" else [],
            )
            for cache in model.caches
            for buffer in cache.buffers
        ],
        states=[StateInput(s.input, s.output, [1, *s.shape]) for s in model.states],
        tokens_per_call=model.tokens_per_call,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        processor=model.processor,
    )
    return msgspec.structs.replace(contract, bounds=backend.bounds(contract, context=context))


def _lookup_shape(table: Table) -> list[int | str]:
    layers = [] if table.layers is None else [table.layers]
    return [1, ALL_TOKENS if table.whole_text else TOKENS, *layers, table.width]


def _cache_shape(cache: Cache, buffer: CacheBuffer, conventions: Conventions) -> list[int | str]:
    shape: list[int | str] = [1, cache.heads, buffer.width]
    shape.insert(
        conventions.slot_axis, CONTEXT_CAPACITY if cache.window is None else WINDOW_CAPACITY
    )
    return shape
