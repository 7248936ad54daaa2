"""Quantized checkpoints: which tensors are codes, by the config alone, and how codes are read.

Source of the format `gemma`: transformers `integrations/gemma_quant.py`, `quantizer_gemma.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.codes import QuantizedRows, unpack_codes
from pleexport.dtypes import bits, packed_bytes
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.model import Codes, Model, Rows, Table, Unused, Weight
from pleexport.sizes import groups

BITS = (2, 4, 8)
ACTIVATION_SCALES = ("input_activation_scale", "output_activation_scale")
METHOD = "gemma"
# What to use in place of a form that is not read, by what its config calls it.
_INSTEAD = {
    "compressed-tensors": "use the `-qat-mobile-transformers` form of the same model, or the "
    "full-precision checkpoint that it was made from",
    "gguf": "use the safetensors checkpoint that it was made from",
}
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_USUALLY = "start from the full-precision checkpoint that it was made from"
# Fields of a `quantization_config`, and of one of its rules, that say nothing of the numbers.
_FIELDS = {
    "quant_method",
    "num_bits",
    "quantize_embeddings",
    "module_quant_configs",
    "modules_to_not_convert",
}


@dataclass(frozen=True)
class Quantization:
    """The rules of a config: which modules hold codes, and of how many bits.

    Attributes:
        num_bits: of a module that no rule names.
        embeddings: whether lookup tables hold codes too.
        rules: bits by regular expression; the match that begins furthest left wins, then the order.
        plain: names of modules that hold numbers.
    """

    num_bits: int
    embeddings: bool
    rules: Mapping[str, int]
    plain: tuple[str, ...]

    def bits_of(self, module: str) -> int | None:
        """Bits of a module's codes, by its whole name; None where it holds numbers.

        Source: transformers `replace_with_quant_layers`, `should_convert_module`.
        """
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        if any(
            re.match(f"(?:{name}){boundary}", module) or module.endswith(name)
            for name in self.plain
        ):
            return None
        if not self.rules:
            return self.num_bits
        joined = "|".join(f"(?P<g{i}>{pattern})" for i, pattern in enumerate(self.rules))
        match = re.search(joined, module)
        if match is None:
            return self.num_bits
        groups = match.groupdict()
        first = next(i for i in range(len(self.rules)) if groups[f"g{i}"] is not None)
        return list(self.rules.values())[first]


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
        raise CheckpointError(f"{where} is {values!r}; expected an object", hint=_USUALLY)
    method = values.get("quant_method")
    if method != METHOD:
        raise UnsupportedError(
            f"{where}: weights quantized by `{method}` are not read; `{METHOD}` is",
            hint=_INSTEAD.get(str(method), _USUALLY),
        )
    unknown = sorted(values.keys() - _FIELDS)
    if unknown:
        raise UnsupportedError(
            f"{where}: unknown fields {', '.join(f'`{n}`' for n in unknown)} might change what "
            "the model computes",
            hint="remove them from a copy of config.json if they do not",
        )
    default_bits = _bits(values.get("num_bits", 4), where)
    rules = values.get("module_quant_configs") or {}
    plain = values.get("modules_to_not_convert") or []
    if not isinstance(rules, dict) or not isinstance(plain, list):
        raise CheckpointError(f"{where} has malformed rules", hint=_USUALLY)
    by_pattern = {}
    for pattern, rule in rules.items():
        if not isinstance(rule, dict) or rule.keys() - {"num_bits"}:
            raise UnsupportedError(
                f"{where}: the rule of `{pattern}` is {rule!r}; only `num_bits` is known",
                hint=_USUALLY,
            )
        by_pattern[pattern] = _bits(rule.get("num_bits", default_bits), where)
    _check_patterns([*by_pattern, *map(str, plain)], where)
    return Quantization(
        num_bits=default_bits,
        embeddings=bool(values.get("quantize_embeddings", False)),
        rules=by_pattern,
        plain=tuple(map(str, plain)),
    )


def mark_codes(model: Model, quantization: Quantization, checkpoint: Checkpoint) -> Model:
    """The same model, with its tables and matrices marked as the checkpoint stores them.

    Activations are rounded by the scales that the checkpoint has; a scale of 0 means none.
    """
    prefix = _prefix(model, checkpoint)
    tables = tuple(_marked_table(table, quantization, prefix) for table in model.tables)
    weights = tuple(_marked(weight, quantization, prefix) for weight in model.weights)
    found, unused = [], dict(model.unused)
    for weight in weights:
        module = weight.source_key.removesuffix(".weight")
        for name in ACTIVATION_SCALES if weight.codes else ():
            entry = next(
                (n for n in _names(model, prefix, f"{module}.{name}") if n in checkpoint.entries),
                None,
            )
            if entry is None:
                continue
            if _activation_scale(checkpoint, entry):
                found.append(Weight(f"{module}.{name}", (), is_buffer=True))
            else:
                unused[f"{module}.{name}"] = Unused((), "0 means that nothing is rounded")
    for layer in range(model.num_layers):
        for name in ("k_cache_scale", "v_cache_scale"):
            key = f"layers.{layer}.self_attn.{name}"
            unused[key] = Unused((), "the original does not use it")
    return replace(model, tables=tables, weights=(*weights, *found), unused=unused)


def _activation_scale(checkpoint: Checkpoint, name: str) -> float:
    """The one number of a scale that activations are rounded by; 0 for none.

    Raises:
        CheckpointError: it is another tensor, or no scale.
    """
    array = checkpoint.array(name)
    scale = float(array) if array.shape == () else None
    if scale is None or not (scale == 0 or _SMALLEST_SCALE <= scale < np.inf):
        found = f"shape {list(array.shape)}" if scale is None else f"value {scale:g}"
        raise CheckpointError(
            f"tensor `{name}` has {found}; expected one positive number, or 0 for no rounding",
            hint="download the checkpoint again",
        )
    return scale


def _prefix(model: Model, checkpoint: Checkpoint) -> str:
    """Where the text model lies: the first place that has anything of its first table."""
    module = model.tables[0].keys[0].removesuffix("weight")
    for prefix in model.text_prefixes:
        if any(name.startswith(prefix + module) for name in checkpoint.entries):
            return prefix
    return next(iter(model.text_prefixes))


def _names(model: Model, prefix: str, key: str) -> list[str]:
    """Names that a key may have in the checkpoint."""
    return [place + key for place in (prefix, *model.text_prefixes[prefix])]


def _marked(weight: Weight, quantization: Quantization, prefix: str) -> Weight:
    module = weight.source_key.removesuffix(".weight")
    if weight.constant is not None or len(weight.shape) != 2 or module == weight.source_key:
        return weight
    # A head lies beside the text model, at the top.
    width = quantization.bits_of(module if weight.precision == "head" else prefix + module)
    if width is None:
        return weight
    scales = f"{module}.weight_scale"
    return replace(
        weight, codes=Codes(f"int{width}", weight.shape[1], "fp32", (weight.source_key, scales))
    )


def _marked_table(table: Table, quantization: Quantization, prefix: str) -> Table:
    module = table.keys[0].removesuffix(".weight")
    width = quantization.bits_of(prefix + module) if quantization.embeddings else None
    if width is None or len(table.keys) > 1 or table.fold:
        return table
    codes, scales = f"{module}.embedding_quantized", f"{module}.embedding_scale"
    return replace(table, codes=Codes(f"int{width}", table.width, "fp32", (codes, scales)))


def read_codes(
    codes: NDArray[Any],
    scales: NDArray[Any],
    how: Codes,
    *,
    width: int,
    rows: Rows = slice(None),
    columns: slice = slice(None),
) -> QuantizedRows:
    """A part of a matrix as codes `[n, 1, k]` and float32 scales `[n, 1, groups]`.

    Args:
        columns: a range that begins with a whole byte of codes; of whole groups, or inside of one.
    """
    begin, end, _ = columns.indices(width)
    first = begin * bits(how.dtype) // 8
    packed = codes[rows, first : first + packed_bytes(end - begin, how.dtype)]
    raw = np.ascontiguousarray(packed).view(np.uint8)
    signed = unpack_codes(raw, bits=bits(how.dtype), width=end - begin)
    own = scales[rows, begin // how.group_size : groups(end, how.group_size)]
    return QuantizedRows(signed[:, None], np.asarray(own, np.float32)[:, None])


def _bits(value: Any, where: str) -> int:
    if value not in BITS or isinstance(value, bool):
        raise UnsupportedError(
            f"{where}: `num_bits` is {value!r}; implemented: {', '.join(map(str, BITS))}",
            hint=_USUALLY,
        )
    return int(value)


def _check_patterns(patterns: list[str], where: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as err:
            raise CheckpointError(
                f"{where}: `{pattern}` is no regular expression: {err}", hint=_USUALLY
            ) from err
