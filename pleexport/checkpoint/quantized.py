"""Quantized checkpoints: which tensors are codes, by the config alone, and how codes are read.

Each method has a module of its own: `gemma_rules`, `compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint import compressed_tensors, gemma_rules
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.compressed_tensors import read_compressed_tensors
from pleexport.checkpoint.gemma_rules import read_gemma_rules
from pleexport.checkpoint.quantization_fields import FULL_PRECISION
from pleexport.codes import QuantizedRows, unpack_codes
from pleexport.dtypes import bits, packed_bytes
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.model import Codes, Model, Rows, Table, Unused, Weight
from pleexport.sizes import groups

# What to use in place of a form that is not read, by what its config calls it.
_INSTEAD = {
    "gguf": "use the safetensors checkpoint that it was made from",
}
_USUALLY = (
    f"{FULL_PRECISION}, or from its form in compressed-tensors (`pack-quantized`), which is read"
)
# Files that tell of a method, where config.json does not.
_SIDE_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
_WORD_BITS = 32
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_ALONE = "model."


class Quantization(Protocol):
    """The rules of a config: which modules hold codes, and how.

    Modules are called by their whole names; `weight` and `table` say what the model has there.
    """

    @property
    def exact_multipliers(self) -> bool:
        """Whether lookups are multiplied by a scale that is not rounded to the dtype."""
        ...

    @property
    def companions(self) -> tuple[str, ...]:
        """Tensors beside a matrix, which are not used where the matrix is not."""
        ...

    @property
    def scales_may_lack(self) -> bool:
        """Whether activations are left alone where a file has no scale, or 0."""
        ...

    def matrix(self, module: str, weight: Weight) -> Codes | None:
        """How a matrix is held; None for numbers."""
        ...

    def table(self, module: str, table: Table) -> Codes | None:
        """How a table is held; None for numbers."""
        ...

    def activation_scales(self, module: str, weight: Weight) -> tuple[Weight, ...]:
        """What a matrix's inputs and outputs are rounded by."""
        ...

    def cache_scales(self, layer: int) -> tuple[Weight, ...]:
        """What an int8 cache of a layer rounds keys and values by, if the file has it."""
        ...


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The rules in a config.json; None for a checkpoint of plain numbers.

    Raises:
        UnsupportedError: another method of quantization, named, with what to use instead.
        CheckpointError: malformed rules.
    """
    values = config.get("quantization_config")
    if values is None:
        text = config.get("text_config")
        values = text.get("quantization_config") if isinstance(text, dict) else None
    if values is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is {values!r}; expected an object", hint=FULL_PRECISION)
    method = values.get("quant_method")
    if method == gemma_rules.METHOD:
        return read_gemma_rules(values, where)
    if method == compressed_tensors.METHOD:
        return read_compressed_tensors(values, where)
    algorithm = values.get("quant_algo")
    named = f"`{method}`" if algorithm is None else f"`{method}` (`{algorithm}`)"
    raise UnsupportedError(
        f"{where}: weights quantized by {named} are not read; those of `{gemma_rules.METHOD}` and "
        f"`{compressed_tensors.METHOD}` are",
        hint=_INSTEAD.get(str(method), _USUALLY),
    )


def refuse_side_files(checkpoint: Checkpoint) -> None:
    """Refuse a folder that tells of quantization in a file of its own only.

    Raises:
        UnsupportedError: names the method.
    """
    if checkpoint.config.get("quantization_config") is not None:
        return
    for name, method in _SIDE_FILES.items():
        if (checkpoint.folder / name).is_file():
            raise UnsupportedError(
                f"`{checkpoint.folder / name}` says that the weights are quantized by {method}, "
                "which is not read",
                hint=_USUALLY,
            )


def mark_codes(model: Model, quantization: Quantization, checkpoint: Checkpoint) -> Model:
    """The same model, with its tables and matrices marked as the checkpoint stores them.

    Raises:
        UnsupportedError: a matrix whose groups are not in order.
    """
    names = _Names(model, checkpoint)
    tables = tuple(_marked_table(table, quantization, names) for table in model.tables)
    of_tables = {table.keys[0]: table.codes for table in tables}
    weights = tuple(_marked(weight, quantization, names, of_tables) for weight in model.weights)
    unused = dict(model.unused)
    for key, reason in model.unused.items():
        if key.startswith("layers.") and key.endswith(".weight"):
            stem = key.removesuffix("weight")
            unused |= {stem + name: replace(reason, shape=()) for name in quantization.companions}
    scales = []
    for weight in weights:
        if not weight.codes or weight.source_key in of_tables:
            continue
        unused |= _order_of_groups(weight, names)
        for scale in quantization.activation_scales(names.module(weight), weight):
            found = names.entry(scale.source_key)
            if found is None and quantization.scales_may_lack:
                continue
            if found and quantization.scales_may_lack and not _scale(checkpoint, found):
                unused[scale.source_key] = Unused((), "0 means that nothing is rounded")
            else:
                scales.append(scale)
    for table in tables:
        if table.codes:
            # A copy of what follows from the config, which compressed-tensors may add.
            key = f"{table.keys[0].removesuffix('.weight')}.embed_scale"
            unused[key] = Unused((), "the multiplier follows from config.json")
    have_context = {cache.layer for cache in model.caches if cache.window is None}
    for layer in range(model.num_layers):
        for scale in quantization.cache_scales(layer):
            found = names.entry(scale.source_key)
            if layer not in have_context:
                unused[scale.source_key] = Unused((), "the layer has no cache of the whole context")
            elif found and _scale(checkpoint, found):
                scales.append(scale)
            else:
                unused[scale.source_key] = Unused((), "0 means that a build chooses scales")
    return replace(model, tables=tables, weights=(*weights, *scales), unused=unused)


class _Names:
    """What modules and tensors of a model are called in a checkpoint."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._prefix = _prefix(model, checkpoint)
        self._places = (self._prefix, *model.text_prefixes[self._prefix])

    def entry(self, key: str) -> str | None:
        """The whole name of a tensor; None where there is none."""
        names = (place + key for place in self._places)
        return next((name for name in names if name in self.checkpoint.entries), None)

    def module(self, item: Weight | Table) -> str:
        """The whole name of a module: a head of its own lies beside the text model, at the top."""
        if isinstance(item, Table):
            return self._prefix + item.keys[0].removesuffix(".weight")
        prefix = "" if item.precision == "head" else self._prefix
        return prefix + item.source_key.removesuffix(".weight")


def _scale(checkpoint: Checkpoint, name: str) -> float:
    """The one number that activations, keys or values are rounded by; 0 for none.

    Raises:
        CheckpointError: it is another tensor, or no scale.
    """
    array = checkpoint.array(name)
    scale = float(array.item()) if array.size == 1 else None
    if scale is None or not (scale == 0 or _SMALLEST_SCALE <= scale < np.inf):
        found = f"shape {list(array.shape)}" if scale is None else f"value {scale:g}"
        raise CheckpointError(
            f"tensor `{name}` has {found}; expected one positive number, or 0 for no rounding",
            hint="fetch the checkpoint again",
        )
    return scale


def _prefix(model: Model, checkpoint: Checkpoint) -> str:
    """Where the text model lies: the first place that has anything of its first table."""
    module = model.tables[0].keys[0].removesuffix("weight")
    for prefix in model.text_prefixes:
        if any(name.startswith(prefix + module) for name in checkpoint.entries):
            return prefix
    # Without weights: a text model of its own, or a part of a multimodal one.
    alone = "text_config" not in checkpoint.config and _ALONE in model.text_prefixes
    return _ALONE if alone else next(iter(model.text_prefixes))


def _marked(
    weight: Weight,
    quantization: Quantization,
    names: _Names,
    of_tables: Mapping[str, Codes | None],
) -> Weight:
    """A weight with its codes; a tied head has those of its table.

    Args:
        of_tables: by key, how tables are held.
    """
    if weight.source_key in of_tables:
        return replace(weight, codes=of_tables[weight.source_key])
    is_matrix = weight.constant is None and len(weight.shape) == 2
    if not is_matrix or not weight.source_key.endswith(".weight"):
        return weight
    return replace(weight, codes=quantization.matrix(names.module(weight), weight))


def _marked_table(table: Table, quantization: Quantization, names: _Names) -> Table:
    if len(table.keys) > 1 or table.fold:
        return table
    codes = quantization.table(names.module(table), table)
    if codes is None:
        return table
    scales = names.entry(codes.keys[1])
    if scales and names.checkpoint.entries[scales].dtype == "fp16":
        codes = replace(codes, scale_dtype="fp16")
    return replace(table, codes=codes)


def _order_of_groups(weight: Weight, names: _Names) -> dict[str, Unused]:
    """The tensor that says which group each input belongs to, where it says nothing new.

    Raises:
        UnsupportedError: inputs are in another order than their groups.
    """
    key = f"{weight.source_key}_g_idx"
    entry = names.entry(key)
    if entry is None or weight.codes is None:
        return {}
    order = names.checkpoint.array(entry)
    expected = np.arange(weight.shape[1]) // weight.codes.group_size
    if not (order < 0).any() and not np.array_equal(order, expected):
        raise UnsupportedError(
            f"`{entry}` puts inputs into another order (`actorder` of GPTQ), which is not "
            "implemented",
            hint="quantize it again with `actorder` `weight` or none",
        )
    return {key: Unused((), "inputs are in the order of their groups")}


def read_codes(
    codes: NDArray[Any],
    scales: NDArray[Any],
    how: Codes,
    *,
    width: int,
    rows: Rows = slice(None),
    columns: slice = slice(None),
    zero_points: NDArray[Any] | None = None,
) -> QuantizedRows:
    """A part of a matrix as codes `[n, 1, k]`, float32 scales and zero points `[n, 1, groups]`.

    Args:
        columns: a range that begins with a whole byte of codes; of whole groups, or inside of one.
        zero_points: `[N, groups]` int8, or packed along N like codes.
    """
    begin, end, _ = columns.indices(width)
    first = begin * bits(how.dtype) // 8
    # The bytes of a word are in the order of its codes.
    in_bytes = codes.view(np.uint8) if how.in_words else codes
    packed = in_bytes[rows, first : first + packed_bytes(end - begin, how.dtype)]
    raw = np.ascontiguousarray(packed).view(np.uint8)
    if how.in_words and how.dtype == "int8":
        raw = raw ^ np.uint8(128)
    signed = unpack_codes(raw, bits=bits(how.dtype), width=end - begin)
    of_groups = slice(begin // how.group_size, groups(end, how.group_size))
    own = np.asarray(scales[rows, of_groups], np.float32)[:, None]
    if zero_points is None:
        return QuantizedRows(signed[:, None], own)
    if how.in_words:
        zeros = _unpacked_rows(zero_points[:, of_groups], rows, len(codes), bits(how.dtype))
    else:
        zeros = zero_points[rows, of_groups]
    return QuantizedRows(signed[:, None], own, zeros[:, None])


def _unpacked_rows(
    packed: NDArray[Any], rows: Rows, num_rows: int, code_bits: int
) -> NDArray[np.int8]:
    """Rows of codes that were packed along the rows, into words."""
    wanted = np.arange(*rows.indices(num_rows)) if isinstance(rows, slice) else rows
    words = packed[wanted * code_bits // _WORD_BITS].view(np.uint32)
    shifts = (wanted * code_bits % _WORD_BITS).astype(np.uint32)
    unsigned = words >> shifts[:, None] & np.uint32(2**code_bits - 1)
    signed: NDArray[np.int8] = (unsigned.astype(np.int16) - 2 ** (code_bits - 1)).astype(np.int8)
    return signed
