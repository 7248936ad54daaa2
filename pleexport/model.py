"""What every family tells the rest of the program about a model.

A family turns a config into a `Model`: its tables, its dense weights, its caches, and the function
that computes logits from them. Nothing here imports torch, so that `inspect` runs without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pleexport.dtypes import CacheDtype
from pleexport.errors import FamilyError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from pleexport.contract import Processor
    from pleexport.families.layers import Parameters

Precision = Literal["quantizable", "sensitive", "head", "full"]
# Slots of a context that attention takes at once. Larger blocks take less time a slot in long
# texts, smaller ones waste less in short ones.
CONTEXT_BLOCK = 512
# What names of scales end with that inputs or outputs of a matrix are rounded by.
ACTIVATION_SCALE = "_activation_scale"
# And those that keys or values are rounded by in an int8 cache.
_CACHE_STEP = "_cache_step"
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "relu")


Rows = NDArray[np.int64] | slice
ReadRows = Callable[[str, Rows], NDArray[np.float32]]


@dataclass(frozen=True)
class Fold:
    """Rows of a table that follow from several tensors of the checkpoint, in float32.

    Attributes:
        sources: shapes of the tensors that it reads beside the table's own, by key.
        compute: given a function that reads rows of a tensor by its key, and the rows that are
            wanted, their values `[n, row width]`.
    """

    sources: Mapping[str, tuple[int, ...]]
    compute: Callable[[ReadRows, Rows], NDArray[np.float32]]


@dataclass(frozen=True)
class Codes:
    """How a table's segments, or a matrix, are quantized: value = (code - zero point) * scale.

    Attributes:
        dtype: of the codes, one of `CODED`.
        group_size: elements of a segment, or of a matrix's or table's row, that share a scale.
        scale_dtype: "fp16" or "fp32".
        keys: of the codes and of the scales in the checkpoint.
        zero_points: key of the groups' zero points; "" where all are 0.
        shape: key of a tensor that repeats the shape; "" where there is none.
        in_words: codes are joined to int32, not to bytes.
    """

    dtype: str
    group_size: int
    scale_dtype: str
    keys: tuple[str, str] = field(default=("", ""), compare=False)
    zero_points: str = ""
    shape: str = field(default="", compare=False)
    in_words: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Table:
    """A lookup table: for each token id a row `[layers * width]`, layer-major.

    Attributes:
        name: segments are called `name` or `name.{layer}`.
        keys: its tensors in the checkpoint, below the text prefix: one that holds whole rows, or
            one for each layer.
        rows: token ids that the tensors hold.
        layers: number of segments a row is cut into; None for one that belongs to no layer.
        width: elements of a segment.
        multiplier: applied once to a looked-up vector, in float32.
        graph_input: the graph's input that takes the vectors.
        outside: what ids >= rows select; "row 0", or "error" where the original fails on them.
        fold: how rows are computed, where they are not the tensors' own.
        whole_text: each call gets the vectors of all tokens so far, not of the new ones only.
        codes: how the checkpoint holds it, where it is quantized.
        on_grid: its rows were trained for 4 bits and lie close to a grid of `GRID_GROUP` values.
    """

    name: str
    keys: tuple[str, ...]
    rows: int
    layers: int | None
    width: int
    graph_input: str
    multiplier: float = 1.0
    outside: Literal["row 0", "error"] = "error"
    fold: Fold | None = None
    whole_text: bool = False
    codes: Codes | None = None
    on_grid: bool = False

    @property
    def row_width(self) -> int:
        """Elements of a row."""
        return self.width * (self.layers or 1)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that its rows are made from, by key."""
        shape: tuple[int, ...] = (self.rows, self.row_width // len(self.keys))
        own = dict.fromkeys(self.keys, shape)
        return own | dict(self.fold.sources) if self.fold else own

    @property
    def segment_codes(self) -> Codes | None:
        """How segments hold its own codes; None where it has none, or with zero points."""
        if self.codes is None or self.codes.zero_points:
            return None
        return replace(self.codes, group_size=min(self.codes.group_size, self.width))

    def source_dtype(self, checkpoint_dtype: str) -> str:
        """The dtype that holds its rows without loss: what is computed is float32."""
        return "fp32" if self.fold or self.codes else checkpoint_dtype

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
        transposed: the checkpoint holds `[inputs, outputs]` of a matrix.
        leading_ones: axes of one that the checkpoint puts before the shape.
        codes: how the checkpoint holds it, where it is quantized.
        on_grid: it was trained for 4 bits and lies close to a grid of `GRID_GROUP` values.
        as_stored: it is not rounded to the checkpoint's dtype first; the original does not load it.
    """

    name: str
    shape: tuple[int, ...]
    precision: Precision = "full"
    key: str | None = None
    constant: NDArray[np.float32] | None = None
    is_buffer: bool = False
    transposed: bool = False
    leading_ones: int = 0
    codes: Codes | None = None
    on_grid: bool = False
    as_stored: bool = False

    @property
    def source_key(self) -> str:
        """The key to read."""
        return self.key or self.name

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        return (1,) * self.leading_ones + (self.shape[::-1] if self.transposed else self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def unused_weight(weight: Weight, family: str) -> FamilyError:
    """What a backend says of a weight that is declared, and that nothing takes."""
    return FamilyError(
        f"weight `{weight.name}` of family `{family}` is declared and not used by its forward "
        "function",
        hint="take it out of the family's weights, or use it",
    )


def misused_weight(weight: Weight, *, taker: str) -> FamilyError:
    """What a backend says of a weight that may be rounded, and that no linear layer takes."""
    return FamilyError(
        f"weight `{weight.name}` has precision `{weight.precision}`, and {taker} takes it",
        hint="such weights are for `w.linear` alone; declare others with precision `full`",
    )


@dataclass(frozen=True)
class CacheBuffer:
    """One tensor `[1, heads, capacity, width]` of a cache.

    Attributes:
        input, output: names in the graph.
        dtype: of its values, never "none".
        shared_outputs: names of what the layers that share it give, where they write it once more.
    """

    input: str
    output: str
    width: int
    dtype: CacheDtype
    shared_outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, written in place.

    A token at position p lies in slot p modulo capacity. A layer with a `window` sees that many
    positions, its own included; one without sees all of them. Values are as wide as keys unless
    `value_dim` says otherwise.

    Attributes:
        dtype: of its tensors, "none" left out.
        shared_by: further layers that attend to it.
    """

    layer: int
    heads: int
    head_dim: int
    window: int | None
    value_dim: int | None = None
    dtype: CacheDtype = "fp32"
    shared_by: tuple[int, ...] = ()

    @property
    def block(self) -> int:
        """What the capacity is a multiple of."""
        return CONTEXT_BLOCK if self.window is None else 1

    @property
    def buffers(self) -> tuple[CacheBuffer, ...]:
        """Keys and values; for int8 also the scale of each vector."""
        parts: list[tuple[str, int, CacheDtype]] = [
            ("key", self.head_dim, self.dtype),
            ("value", self.value_dim or self.head_dim, self.dtype),
        ]
        if self.dtype == "int8":
            parts += [("key_scale", 1, "fp32"), ("value_scale", 1, "fp32")]
        return tuple(
            CacheBuffer(
                f"past_key_values.{self.layer}.{name}",
                f"present.{self.layer}.{name}",
                width,
                kind,
                tuple(f"present.{layer}.{name}" for layer in self.shared_by),
            )
            for name, width, kind in parts
        )


def cache_steps(layer: int) -> tuple[str, str]:
    """Names of the weights that say what an int8 cache rounds keys and values by."""
    return f"layers.{layer}.key{_CACHE_STEP}", f"layers.{layer}.value{_CACHE_STEP}"


@dataclass(frozen=True)
class State:
    """A float32 tensor `[1, *shape]` that each call hands on to the next; zeros before a text.

    Attributes:
        name: the layer's number, a dot, and what it holds.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def input(self) -> str:
        """Name of the graph's input."""
        return f"past_state.{self.name}"

    @property
    def output(self) -> str:
        """Name of the graph's output."""
        return f"present_state.{self.name}"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Unused:
    """A tensor that checkpoints carry and the original ignores."""

    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class GraphInputs:
    """Tensors that one call of the dense graph gets.

    Attributes:
        rows: by graph input, looked-up vectors `[1, T, width]` or `[1, T, layers, width]`; of a
            table of the whole text, as many as there are positions so far.
        position_ids: `[1, T]` int64, consecutive.
        caches: by layer, the tensors of `Cache.buffers`.
        capacities: by layer, the slots of its cache.
        windows: by layer, that of its cache, which is a ring then; None where it has all positions.
        states: by name, what the call before handed on.
        logit_positions: `[N]` int64, which of the T positions want logits, ascending.
    """

    rows: Mapping[str, Tensor]
    position_ids: Tensor
    caches: Mapping[int, tuple[Tensor, ...]]
    capacities: Mapping[int, int]
    windows: Mapping[int, int | None]
    states: Mapping[str, Tensor]
    logit_positions: Tensor


@dataclass(frozen=True)
class GraphOutputs:
    """Tensors that one call of the dense graph gives.

    Attributes:
        logits: `[1, N, vocab]`.
        caches: by layer, the same tensors with the T new positions written.
        hidden: by layer, what the layer hands on; parity looks there for a first difference.
        states: by name, what the next call takes up.
    """

    logits: Tensor
    caches: Mapping[int, tuple[Tensor, ...]]
    hidden: list[Tensor]
    states: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Figures that a model's makers state, with the shape they belong to.

    Attributes:
        live_text: parameters of the text model, which identify the shape.
        stored: parameters of the whole published checkpoint; None where not known for certain.
        total, embedding, effective: the rounded figures; None likewise.
    """

    name: str
    live_text: int
    stored: int | None
    total: str | None
    embedding: str | None
    effective: str


class Forward(Protocol):
    """Compute logits; traced once by torch.export."""

    def __call__(self, weights: Parameters, inputs: GraphInputs, /) -> GraphOutputs: ...


class Reference(Protocol):
    """A plain implementation of a model that no library has, one token at a time."""

    name: str

    def start(self) -> Any:
        """A fresh state of a text, which `step` changes."""
        ...

    def vectors(self, token_id: int) -> dict[str, Tensor]:
        """What a token looks up, by graph input: `[width]`, or `[layers, width]`."""
        ...

    def step(self, vectors: Mapping[str, Tensor], state: Any) -> tuple[Tensor, list[Tensor]]:
        """Logits `[vocab]` after one more token, and what each layer hands on."""
        ...


MakeReference = Callable[[Mapping[str, "Tensor"], dict[str, Any]], Reference]


@dataclass(frozen=True)
class TransformersOriginal:
    """How `transformers` loads a text model alone, also from a multimodal checkpoint.

    Attributes:
        model_type: of the text model's config.
        key_mapping: by regular expression, what the text model's own keys begin with in place of
            what it matches; see `from_pretrained`.
        inherited: fields that the text part of a config may leave to the whole config, with what
            they mean where neither has them.
        float_fields: config fields that it takes as floats only; JSON has one kind of number.
        renamed_modules: parts of module names in a checkpoint's rules, with what the text model
            alone calls them.
        stream_axis: of what a layer hands on, the axis of its parallel streams; None for one
            stream, `[B, T, H]`. `GraphOutputs.hidden` has streams behind the positions.
    """

    model_type: str
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, object] = field(default_factory=dict)
    float_fields: frozenset[str] = frozenset()
    renamed_modules: Mapping[str, str] = field(default_factory=dict)
    stream_axis: int | None = None


@dataclass(frozen=True)
class Model:
    """One configured model of a family.

    Attributes:
        family: name of the family.
        num_rows: token ids that can be looked up: 0 to num_rows - 1.
        row_aliases: ids that the original replaces before looking up.
        states: what recurrent layers hand from call to call.
        tokens_per_call: most tokens of one call of the graph, where a layer needs the one before to
            be finished; None for any number.
        text_prefixes: where the text model may lie in a checkpoint, most specific first. Each with
            the places where a key is looked for that is not there: a head lies beside the text
            model, not inside it.
        unused: tensors that the original ignores, by key.
        ignored_prefixes: what names of tensors begin with that belong to parts that are left out
            (towers), with what the parts are called.
        eos_token_ids: ids that end a text, as far as the config says.
        strict_attention: in some layer a token does not see its own position.
        without_cache: the same model, which reads rows again in place of keeping keys and values.
        processor: what its graph is to be written for; see `on`.
        leaves_rounding_out: the original rounds activations, and the dense graph does not.
        published: shapes of published models, with the figures that their makers state.
        counts_only_tables_out: the makers' "effective" count is all but the tables; otherwise it is
            the difference of two rounded figures.
        transformers: how `transformers` loads the original; None where it does not have it.
        reference: else what makes the original from the checkpoint's tensors and its config.
    Raises:
        FamilyError: it has no original to be compared with, or two.
    """

    family: str
    num_layers: int
    vocab_size: int
    num_rows: int
    max_context: int
    tables: tuple[Table, ...]
    weights: tuple[Weight, ...]
    forward: Forward
    caches: tuple[Cache, ...] = ()
    states: tuple[State, ...] = ()
    tokens_per_call: int | None = None
    unused: Mapping[str, Unused] = field(default_factory=dict)
    row_aliases: Mapping[int, int] = field(default_factory=dict)
    text_prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})
    ignored_prefixes: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    strict_attention: bool = False
    without_cache: Model | None = None
    processor: Processor = "cpu"
    leaves_rounding_out: bool = False
    published: tuple[Published, ...] = ()
    counts_only_tables_out: bool = False
    transformers: TransformersOriginal | None = None
    reference: MakeReference | None = None

    def __post_init__(self) -> None:
        if (self.transformers is None) == (self.reference is None):
            found = "no original" if self.reference is None else "two originals"
            raise FamilyError(
                f"family `{self.family}` names {found} to be compared with; expected one",
                hint="give its `Model` either `transformers` or `reference`",
            )

    def with_cache(self, dtype: CacheDtype) -> Model:
        """The model that keeps keys and values in a dtype, or in none.

        A window is small, and float32 always.

        Raises:
            UnsupportedError: they do not follow from rows alone, so that they have to be kept.
        """
        if dtype != "none":
            caches = (replace(c, dtype=dtype) if c.window is None else c for c in self.caches)
            cached = replace(self, caches=tuple(caches))
            if dtype == "int8":
                return cached
            steps = [w for w in self.weights if w.name.endswith(_CACHE_STEP)]
            return cached._without(steps, f"keys and values are held in {dtype}")
        if self.without_cache is None:
            raise UnsupportedError(
                f"`--cache-dtype none` is not for `{self.family}`: its keys and values "
                "do not follow from rows alone",
                hint="choose fp32, fp16 or int8",
            )
        return self.without_cache

    def on(self, processor: Processor) -> Model:
        """The model with the caches and calls that a graph for a processor has.

        Attention of a GPU knows no rings, so that windows too have slots for all positions. And it
        runs no loops, so that a recurrence takes one token a call.
        """
        if processor == "cpu":
            return self
        caches = tuple(replace(cache, window=None) for cache in self.caches)
        at_once = 1 if self.states else self.tokens_per_call
        return replace(self, processor=processor, caches=caches, tokens_per_call=at_once)

    def without_activation_rounding(self) -> Model:
        """The model that leaves inputs and outputs of matrices as they are."""
        if not self.rounds_activations:
            return self
        scales = [w for w in self.weights if w.name.endswith(ACTIVATION_SCALE)]
        left = self._without(scales, "activations are not rounded, as the build asks")
        return replace(left, leaves_rounding_out=True)

    def _without(self, weights: Sequence[Weight], reason: str) -> Model:
        """The model that passes weights of the checkpoint over."""
        names = {w.name for w in weights}
        return replace(
            self,
            weights=tuple(w for w in self.weights if w.name not in names),
            unused={
                **self.unused,
                **{w.source_key: Unused(w.source_shape, reason) for w in weights},
            },
        )

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint holds codes."""
        return any(t.codes for t in self.tables) or any(w.codes for w in self.weights)

    @property
    def rounds_activations(self) -> bool:
        """Whether inputs and outputs of matrices are rounded, by scales of the checkpoint."""
        return any(weight.name.endswith(ACTIVATION_SCALE) for weight in self.weights)

    def ignored_part(self, name: str) -> str | None:
        """The part that is left out and that has this tensor of a checkpoint; None for none."""
        prefixes = self.ignored_prefixes.items()
        return next((part for prefix, part in prefixes if name.startswith(prefix)), None)

    @property
    def head(self) -> Weight:
        """The output head."""
        return next(weight for weight in self.weights if weight.precision == "head")

    @property
    def table_of_head(self) -> Table | None:
        """The table whose rows may be those of the output head, as the checkpoint holds it."""
        if self.head.transposed or self.head.leading_ones:
            return None
        return next(
            (
                table
                for table in self.tables
                if (table.rows, table.width) == self.head.shape
                and table.layers is None
                and table.fold is None
                and table.rows >= self.num_rows
            ),
            None,
        )

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
            dtype: the checkpoint's dtype, e.g. "bf16"; the original rounds its constants to it.
        Raises:
            CheckpointError: a field is missing or malformed.
            UnsupportedError: a field asks for something that is not implemented.
        """
        ...


class UnconfiguredFamily(Protocol):
    """A module of this package whose checkpoints have no config.json."""

    def recognize(self, shapes: Mapping[str, tuple[int, ...]]) -> Model | None:
        """The model that tensors of these names and shapes are, or None.

        Raises:
            CheckpointError: a checkpoint of the family whose shapes do not fit each other.
        """
        ...
