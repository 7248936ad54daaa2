"""Names and shapes of the dense graph's inputs and outputs; see docs/graph-contract.md."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pleexport.model import CacheDtype, Model, Table

OPSET = 24
CONTRACT = "pleexport.decoder/1"
TOKENS = "sequence_length"
ALL_TOKENS = "total_sequence_length"
LOGITS = "num_logits"
CONTEXT_CAPACITY = "context_capacity"
WINDOW_CAPACITY = "window_capacity"
POSITION_IDS = "position_ids"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
LOGITS_OUTPUT = "logits"


class LookupInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph input that takes looked-up vectors of one table."""

    name: str
    table: str
    shape: list[int | str]

    @property
    def whole_text(self) -> bool:
        """Whether it takes those of all tokens so far, not of the new ones only."""
        return self.shape[1] == ALL_TOKENS


class CacheInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of a cache: graph input and output of one shape, meant to share a buffer.

    Attributes:
        dtype: "fp32", "fp16" or "int8".
        block: the capacity is a multiple of it.
        window: positions that a token sees, its own included; None for all.
    """

    input: str
    output: str
    layer: int
    shape: list[int | str]
    dtype: CacheDtype
    block: Annotated[int, msgspec.Meta(ge=1)]
    window: int | None


class StateInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A float32 tensor that a call gives and the next call takes; zeros before a text."""

    input: str
    output: str
    shape: list[int]


class GraphContract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runner must know of the graph.

    Attributes:
        id: names the meaning of every input and output.
        tokens_per_call: most tokens of one call; None for any number.
    """

    id: str
    lookup_inputs: list[LookupInput]
    caches: list[CacheInput]
    states: list[StateInput]
    tokens_per_call: Annotated[int, msgspec.Meta(ge=1)] | None
    vocab_size: int
    num_layers: int

    @property
    def held(self) -> list[CacheInput | StateInput]:
        """All that a call takes from the one before."""
        return [*self.caches, *self.states]


def describe(model: Model, cache_dtype: CacheDtype) -> GraphContract:
    """The contract of a model's dense graph."""
    caches = [
        CacheInput(
            input=buffer.input,
            output=buffer.output,
            layer=cache.layer,
            shape=[1, cache.heads, capacity_name(cache.window), buffer.width],
            dtype=buffer.dtype,
            block=cache.block,
            window=cache.window,
        )
        for cache in model.caches
        for buffer in cache.buffers(cache_dtype)
    ]
    lookups = [LookupInput(t.graph_input, t.name, lookup_shape(t)) for t in model.tables]
    return GraphContract(
        id=CONTRACT,
        lookup_inputs=lookups,
        caches=caches,
        states=[StateInput(s.input, s.output, [1, *s.shape]) for s in model.states],
        tokens_per_call=model.tokens_per_call,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
    )


def lookup_shape(table: Table) -> list[int | str]:
    """Shape of the graph input that a table's vectors go to."""
    layers = [] if table.layers is None else [table.layers]
    return [1, ALL_TOKENS if table.whole_text else TOKENS, *layers, table.width]


def capacity_name(window: int | None) -> str:
    """Name of the dimension that counts the slots of a cache."""
    return CONTEXT_CAPACITY if window is None else WINDOW_CAPACITY


def hidden_name(layer: int) -> str:
    """Name of the value that a layer hands on; parity makes it an output."""
    return f"layers.{layer}.output"
