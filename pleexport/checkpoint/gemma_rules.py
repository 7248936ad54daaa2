"""The rules of `quant_method: "gemma"`, Gemma 4's mobile format: which modules hold codes.

Source: transformers `integrations/gemma_quant.py`, `quantizer_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pleexport.checkpoint.patterns import match, search
from pleexport.checkpoint.quantization_fields import (
    FULL_PRECISION,
    check_fields,
    check_patterns,
    read_bits,
)
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.model import Codes, Table, Weight, cache_steps

METHOD = "gemma"
_FIELDS = {
    "quant_method",
    "num_bits",
    "quantize_embeddings",
    "module_quant_configs",
    "modules_to_not_convert",
}


@dataclass(frozen=True)
class GemmaRules:
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

    scales_may_lack = True
    # Beside a matrix that the model does not use.
    companions = ("weight_scale", "input_activation_scale", "output_activation_scale")

    @property
    def exact_multipliers(self) -> bool:
        """Whether lookups are multiplied by a scale that is not rounded to the dtype."""
        return self.embeddings

    def bits_of(self, module: str) -> int | None:
        """Bits of a module's codes, by its whole name; None where it holds numbers.

        Source: transformers `replace_with_quant_layers`, `should_convert_module`.
        """
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        if any(
            match(f"(?:{name}){boundary}", module) or module.endswith(name) for name in self.plain
        ):
            return None
        if not self.rules:
            return self.num_bits
        joined = "|".join(f"(?P<g{i}>{pattern})" for i, pattern in enumerate(self.rules))
        found = search(joined, module)
        if found is None:
            return self.num_bits
        groups = found.groupdict()
        first = next(i for i in range(len(self.rules)) if groups[f"g{i}"] is not None)
        return list(self.rules.values())[first]

    def matrix(self, module: str, weight: Weight) -> Codes | None:
        """How a matrix is held, by the whole name of its module; None for numbers."""
        width = self.bits_of(module)
        if width is None:
            return None
        scales = f"{weight.source_key}_scale"
        return Codes(f"int{width}", weight.shape[1], "fp32", (weight.source_key, scales))

    def table(self, module: str, table: Table) -> Codes | None:
        """How a table is held, by the whole name of its module; None for numbers."""
        width = self.bits_of(module) if self.embeddings else None
        if width is None:
            return None
        stem = table.keys[0].removesuffix(".weight")
        codes, scales = f"{stem}.embedding_quantized", f"{stem}.embedding_scale"
        return Codes(f"int{width}", table.width, "fp32", (codes, scales))

    def activation_scales(self, module: str, weight: Weight) -> tuple[Weight, ...]:
        """What a matrix's inputs and outputs are rounded by, where the file has it."""
        stem = weight.source_key.removesuffix(".weight")
        return tuple(
            Weight(f"{stem}.{side}_activation_scale", (), is_buffer=True)
            for side in ("input", "output")
        )

    def cache_scales(self, layer: int) -> tuple[Weight, ...]:
        """What an int8 cache of a layer rounds keys and values by, if the file has it.

        Other caches do without, as transformers does.
        """
        keys = (f"layers.{layer}.self_attn.{side}_cache_scale" for side in "kv")
        return tuple(
            Weight(step, (), key=key, is_buffer=True, as_stored=True)
            for step, key in zip(cache_steps(layer), keys, strict=True)
        )


def read_gemma_rules(values: Mapping[str, Any], where: str) -> GemmaRules:
    """The rules in a `quantization_config`.

    Args:
        where: what errors call it.
    Raises:
        UnsupportedError: a field, rule or number of bits that is not known.
        CheckpointError: malformed rules.
    """
    check_fields(values, _FIELDS, where)
    default_bits = read_bits(values.get("num_bits", 4), where)
    rules = values.get("module_quant_configs") or {}
    plain = values.get("modules_to_not_convert") or []
    if not isinstance(rules, dict) or not isinstance(plain, list):
        raise CheckpointError(
            f"{where}: `module_quant_configs` is {rules!r} and `modules_to_not_convert` {plain!r}; "
            "expected an object and a list",
            hint=FULL_PRECISION,
        )
    by_pattern = {}
    for pattern, rule in rules.items():
        if not isinstance(rule, dict) or rule.keys() - {"num_bits"}:
            raise UnsupportedError(
                f"{where}: the rule of `{pattern}` is {rule!r}; only `num_bits` is known",
                hint=FULL_PRECISION,
            )
        by_pattern[pattern] = read_bits(rule.get("num_bits", default_bits), where)
    check_patterns([*by_pattern, *map(str, plain)], where)
    return GemmaRules(
        num_bits=default_bits,
        embeddings=bool(values.get("quantize_embeddings", False)),
        rules=by_pattern,
        plain=tuple(map(str, plain)),
    )
