"""What every family tells the rest of the program about a model.

A family turns a config into a `Model`: its tables, its dense weights, its caches, and the function
that computes logits from them. Nothing here imports torch, so that `inspect` runs without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from pleexport.safetensors_file import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from pleexport.layers import Parameters

Precision = Literal["quantizable", "sensitive", "head", "full"]
CacheDtype = Literal["fp32", "fp16", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)
CACHE_ITEM_BYTES: dict[CacheDtype, int] = {"fp32": 4, "fp16": 2, "int8": 1}
# Slots of a context that attention takes at once. Larger blocks take less time a slot in long
# texts, smaller ones waste less in short ones.
CONTEXT_BLOCK = 512
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "relu")


@dataclass(frozen=True)
class Table:
    """A lookup tensor `[rows, layers * width]`, layer-major inside a row.

    Attributes:
        name: segments are called `name` or `name.{layer}`.
        key: the tensor in the checkpoint, below the text prefix.
        rows: token ids that the tensor holds.
        layers: number of segments a row is cut into; None for one that belongs to no layer.
        width: elements of a segment.
        multiplier: applied once to a looked-up vector, in float32.
        graph_input: the graph's input that takes the vectors.
        outside: what ids >= rows select; "row 0", or "error" where the original fails on them.
    """

    name: str
    key: str
    rows: int
    layers: int | None
    width: int
    multiplier: float
    graph_input: str
    outside: Literal["row 0", "error"] = "error"

    @property
    def row_width(self) -> int:
        """Elements of a row."""
        return self.width * (self.layers or 1)

    def source_rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The table rows that token ids select."""
        return np.where(ids < self.rows, ids, 0) if self.outside == "row 0" else ids


@dataclass(frozen=True)
class Weight:
    """A tensor of the dense graph; its name is its key in the checkpoint, below the text prefix.

    Attributes:
        key: another key, where the checkpoint holds it under one (a tied head).
        constant: the values, where they follow from the config instead of the checkpoint.
        precision: "quantizable" may be stored in the build's weight dtype, "sensitive" in at least
            8 bits, "full" is always float32; "head" is the output head, for which a build may
            choose a dtype of its own.
        is_buffer: in the checkpoint, but not counted as a parameter by the original.
    """

    name: str
    shape: tuple[int, ...]
    precision: Precision = "full"
    key: str | None = None
    constant: NDArray[np.float32] | None = None
    is_buffer: bool = False

    @property
    def source_key(self) -> str:
        """The key to read."""
        return self.key or self.name

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CacheBuffer:
    """One tensor `[1, heads, capacity, width]` of a cache.

    Attributes:
        input, output: names in the graph.
        dtype: one of `CACHE_DTYPES`.
    """

    input: str
    output: str
    width: int
    dtype: CacheDtype


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, written in place.

    A token at position p lies in slot p modulo capacity. A layer with a `window` sees that many
    positions, its own included; one without sees all of them.
    """

    layer: int
    heads: int
    head_dim: int
    window: int | None

    @property
    def block(self) -> int:
        """What the capacity is a multiple of."""
        return CONTEXT_BLOCK if self.window is None else 1

    def buffers(self, dtype: CacheDtype) -> tuple[CacheBuffer, ...]:
        """Keys and values; for int8 also the scale of each vector.

        A window is small, and float32 always.
        """
        dtype = dtype if self.window is None else "fp32"
        parts: list[tuple[str, int, CacheDtype]] = [
            ("key", self.head_dim, dtype),
            ("value", self.head_dim, dtype),
        ]
        if dtype == "int8":
            parts += [("key_scale", 1, "fp32"), ("value_scale", 1, "fp32")]
        return tuple(
            CacheBuffer(
                f"past_key_values.{self.layer}.{name}", f"present.{self.layer}.{name}", width, kind
            )
            for name, width, kind in parts
        )


@dataclass(frozen=True)
class Unused:
    """A tensor that checkpoints carry and the original ignores."""

    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class GraphInputs:
    """Tensors that one call of the dense graph gets.

    Attributes:
        rows: by graph input, looked-up vectors `[1, T, width]` or `[1, T, layers, width]`.
        position_ids: `[1, T]` int64, consecutive.
        caches: by layer, the tensors of `Cache.buffers`.
        logit_positions: `[N]` int64, which of the T positions want logits, ascending.
    """

    rows: Mapping[str, Tensor]
    position_ids: Tensor
    caches: Mapping[int, tuple[Tensor, ...]]
    logit_positions: Tensor


@dataclass(frozen=True)
class GraphOutputs:
    """Tensors that one call of the dense graph gives.

    Attributes:
        logits: `[1, N, vocab]`.
        caches: by layer, the same tensors with the T new positions written.
        hidden: by layer, what the layer hands on; parity looks there for a first difference.
    """

    logits: Tensor
    caches: Mapping[int, tuple[Tensor, ...]]
    hidden: list[Tensor]


class Forward(Protocol):
    """Compute logits; traced once by torch.export."""

    def __call__(self, weights: Parameters, inputs: GraphInputs, /) -> GraphOutputs: ...


@dataclass(frozen=True)
class Model:
    """One configured model of a family.

    Attributes:
        family: name of the family.
        num_rows: token ids that can be looked up: 0 to num_rows - 1.
        row_aliases: ids that the original replaces before looking up.
        text_prefixes: where the text model may lie in a checkpoint, most specific first.
        unused: tensors that the original ignores, by key.
        ignored_prefixes: other parts of a checkpoint that are left out (towers), with their name.
        eos_token_ids: ids that end a text, as far as the config says.
    """

    family: str
    num_layers: int
    vocab_size: int
    num_rows: int
    max_context: int
    tables: tuple[Table, ...]
    weights: tuple[Weight, ...]
    caches: tuple[Cache, ...]
    forward: Forward
    unused: Mapping[str, Unused] = field(default_factory=dict)
    row_aliases: Mapping[int, int] = field(default_factory=dict)
    text_prefixes: tuple[str, ...] = ("",)
    ignored_prefixes: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()

    def table(self, name: str) -> Table:
        """The table called `name`."""
        return next(table for table in self.tables if table.name == name)


class Family(Protocol):
    """One module of this package."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:  # noqa: N802
        """The `model_type`s of config.json that it reads."""
        ...

    def configure(self, config: dict[str, Any], *, dtype: str) -> Model:
        """Read a config.json.

        Args:
            dtype: the checkpoint's dtype ("BF16", ...); the original rounds its constants to it.
        Raises:
            CheckpointError: a field is missing or malformed.
            UnsupportedError: a field asks for something that is not implemented.
        """
        ...


def rounded(value: float, dtype: str) -> float:
    """`value` as the original holds it after loading a checkpoint of dtype `dtype`."""
    return float(np.asarray(value, dtype=DTYPES[dtype]))
