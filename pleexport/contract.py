"""What a runner must know of a dense graph: its inputs and outputs; see docs/graph-contract.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pleexport.dtypes import CacheDtype

TOKENS = "sequence_length"
ALL_TOKENS = "total_sequence_length"
CONTEXT_CAPACITY = "context_capacity"
WINDOW_CAPACITY = "window_capacity"
NUM_LOGITS = "num_logits"
POSITION_IDS = "position_ids"
LOGITS_OUTPUT = "logits"

Array = TypeVar("Array", bound=Any)
# What a graph is written for. Any processor computes it, if slowly where it is not its own.
Processor = Literal["cpu", "gpu"]


class LookupInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph input that takes looked-up vectors of one table."""

    name: str
    table: str
    shape: list[int | str]

    @property
    def whole_text(self) -> bool:
        """Whether it takes those of all tokens so far, not of the new ones only."""
        return self.shape[1] == ALL_TOKENS


class CacheInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tensor of a cache: graph input and output of one shape, meant to share a buffer.

    Attributes:
        shape: the one that is a name counts slots.
        block: the capacity is a multiple of it.
        window: positions that a token sees, its own included, of a ring; None where it has slots
            for all.
        shared_outputs: further outputs that are meant to share the buffer, in the graph's order.
    """

    input: str
    output: str
    layer: int
    shape: list[int | str]
    dtype: CacheDtype
    block: Annotated[int, msgspec.Meta(ge=1)]
    window: int | None
    shared_outputs: list[str] = []

    @property
    def outputs(self) -> list[str]:
        """All outputs of the buffer."""
        return [self.output, *self.shared_outputs]

    @property
    def slot_axis(self) -> int:
        """The axis that counts slots."""
        return next(axis for axis, size in enumerate(self.shape) if isinstance(size, str))


class StateInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A float32 tensor that a call gives and the next call takes; zeros before a text."""

    input: str
    output: str
    shape: list[int]


class GraphContract(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a runner must know of the graph.

    Attributes:
        id: names the meaning of every input and output.
        tokens_per_call: most tokens of one call; None for any number.
        bounds: by dynamic dimension, the largest size; of those that are limited.
        processor: what its operators are chosen for.
    """

    id: str
    lookup_inputs: list[LookupInput]
    caches: list[CacheInput]
    states: list[StateInput]
    tokens_per_call: Annotated[int, msgspec.Meta(ge=1)] | None
    vocab_size: int
    num_layers: int
    bounds: dict[str, int] = {}
    processor: Processor = "cpu"

    @property
    def held(self) -> list[CacheInput | StateInput]:
        """All that a call takes from the one before."""
        return [*self.caches, *self.states]

    def cut(self, vectors: Mapping[str, Array], piece: slice) -> dict[str, Array]:
        """Of the vectors of a text, those that a call for its tokens `piece` takes.

        Args:
            vectors: by graph input, an entry for each token.
        """
        text = slice(piece.stop)
        return {
            lookup.name: vectors[lookup.name][text if lookup.whole_text else piece]
            for lookup in self.lookup_inputs
        }


class Artifact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A graph of a bundle, as its backend wrote it.

    Attributes:
        backend: its name.
        files: names in the bundle's folder, the one to open first.
        weights_digest: of the weights as stored.
        versions: of the packages that wrote it.
    """

    backend: str
    contract: GraphContract
    files: list[str]
    weights_digest: str
    versions: dict[str, str]


def pieces(count: int, longest: int) -> Iterator[slice]:
    """A text of `count` tokens, cut into pieces for one call each."""
    for begin in range(0, count, longest):
        yield slice(begin, min(begin + longest, count))


def hidden_name(layer: int) -> str:
    """Name of the value that a layer hands on; backends make it an output for parity."""
    return f"layers.{layer}.output"
