"""The groups of `quant_method: "compressed-tensors"`: which modules hold codes, and how.

A matrix `[N, K]` is `weight_packed`, `[N, ceil(K * bits / 32)]` int32, the first code in the low
bits and each plus 2**(bits - 1); `weight_scale`, `[N, groups]`; `weight_shape`, which says N and K;
and where codes are asymmetric, `weight_zero_point`, packed alike along N. Codes of 8 bits may also
be stored as they are (`int-quantized`).

Source: the package compressed-tensors 0.20: `quantization/quant_config.py`, `quant_scheme.py`,
`quant_args.py`, `utils/match.py`, `quantization/lifecycle/apply.py`, `compressors/pack_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pleexport.checkpoint.patterns import match
from pleexport.checkpoint.quantization_fields import (
    FULL_PRECISION,
    check_fields,
    check_patterns,
    read_bits,
)
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.model import Codes, Table, Weight, cache_steps

METHOD = "compressed-tensors"
PACKED, AS_THEY_ARE = "pack-quantized", "int-quantized"
# Groups of other sizes fit no block of a runtime's.
_GROUP_UNIT = 16
_MATRIX_CLASSES = ("Linear", "Module")
_TABLE_CLASSES = ("Embedding", "Module", "Gemma4TextScaledWordEmbedding")
_FIELDS = {
    "quant_method",
    "format",
    "quantization_status",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "global_compression_ratio",
    "sparsity_config",
    "transform_config",
    "moe_sparsity_config",
    "version",
    "run_compressed",
    "dequantize",
}
_GROUP_FIELDS = {"targets", "weights", "input_activations", "output_activations", "format"}
_NUMBER_FIELDS = {
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
}
_ORDERS = (None, False, True, "weight", "static", "group", "dynamic")


@dataclass(frozen=True)
class Scheme:
    """How the modules of a group are held.

    Attributes:
        bits: of a code.
        group_size: weights of a row that share a scale; None for all.
        symmetric: without zero points.
        packed: codes are joined to int32.
        rounds: "input", "output": what is rounded to 8 bits, by a scale of the file.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    packed: bool
    rounds: tuple[str, ...]


@dataclass(frozen=True)
class CompressedTensors:
    """The groups of a config.

    Attributes:
        schemes: by target, a module's name, its class, or "re:" and a regular expression; None
            where it holds numbers.
        ignored: targets that are left alone.
        caches: whether layers have scales for their keys and values.
    """

    schemes: Mapping[str, Scheme | None]
    ignored: tuple[str, ...]
    caches: bool = False

    # Beside a matrix that the model does not use.
    companions = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "output_scale",
    )
    exact_multipliers = False
    scales_may_lack = False

    def scheme_of(self, module: str, classes: Sequence[str] = _MATRIX_CLASSES) -> Scheme | None:
        """How a module is held, by its whole name; None where it holds numbers.

        Names come before regular expressions, these before classes, and each kind goes by the
        alphabet.

        Source: `match_named_modules`, `match_targets`.
        """
        if any(_names(target, module) or target in classes for target in self.ignored):
            return None
        targets = sorted(self.schemes, key=lambda target: ("re:" in target, target))
        matched = [target for target in targets if _names(target, module)]
        matched += [target for target in targets if target in classes]
        return self.schemes[matched[0]] if matched else None

    def matrix(self, module: str, weight: Weight) -> Codes | None:
        """How a matrix is held, by the whole name of its module; None for numbers.

        Raises:
            CheckpointError: rows are no whole groups.
        """
        scheme = self.scheme_of(module)
        if scheme is None:
            return None
        return _codes(scheme, module, weight.source_key, width=weight.shape[1])

    def table(self, module: str, table: Table) -> Codes | None:
        """How a table is held, by the whole name of its module; None for numbers.

        Raises:
            CheckpointError: rows are no whole groups.
            UnsupportedError: groups cross the vectors of layers, or lookups are rounded.
        """
        scheme = self.scheme_of(module, _TABLE_CLASSES)
        if scheme is None:
            return None
        if scheme.rounds:
            raise UnsupportedError(
                f"config.json: quantization_config rounds what `{module}` looks up, which is not "
                "implemented",
                hint="set `input_activations` and `output_activations` of its group to null in a "
                "copy of config.json, and remove the scales",
            )
        codes = _codes(scheme, module, table.keys[0], width=table.row_width)
        if table.width % codes.group_size and codes.group_size % table.width:
            raise UnsupportedError(
                f"config.json: quantization_config has groups of {codes.group_size} for `{module}`,"
                f" which cross its vectors of {table.width}",
                hint=FULL_PRECISION,
            )
        return codes

    def activation_scales(self, module: str, weight: Weight) -> tuple[Weight, ...]:
        """What a matrix's inputs and outputs are rounded by."""
        scheme, stem = self.scheme_of(module), weight.source_key.removesuffix(".weight")
        return tuple(
            Weight(
                f"{stem}.{side}_activation_scale",
                (),
                key=f"{stem}.{side}_scale",
                is_buffer=True,
                leading_ones=1,
            )
            for side in (scheme.rounds if scheme else ())
        )

    def cache_scales(self, layer: int) -> tuple[Weight, ...]:
        """What an int8 cache of a layer rounds keys and values by."""
        if not self.caches:
            return ()
        keys = (f"layers.{layer}.self_attn.{side}_scale" for side in "kv")
        return tuple(
            Weight(step, (), key=key, is_buffer=True, as_stored=True, leading_ones=1)
            for step, key in zip(cache_steps(layer), keys, strict=True)
        )


def read_compressed_tensors(values: Mapping[str, Any], where: str) -> CompressedTensors:
    """The groups in a `quantization_config`.

    Args:
        where: what errors call it.
    Raises:
        UnsupportedError: a format, strategy or field that is not implemented, named.
        CheckpointError: malformed groups.
    """
    check_fields(values, _FIELDS, where)
    _refuse_other_states(values, where)
    groups, ignored = values.get("config_groups"), values.get("ignore") or []
    if not isinstance(groups, dict) or not groups or not _are_names(ignored):
        raise CheckpointError(
            f"{where}: `config_groups` is {groups!r} and `ignore` {ignored!r}; expected an object "
            "of groups and a list of names",
            hint=FULL_PRECISION,
        )
    schemes: dict[str, Scheme | None] = {}
    for name, group in groups.items():
        named = f"{where}, group `{name}`"
        if not isinstance(group, dict) or not _are_names(group.get("targets")):
            raise CheckpointError(
                f"{named} is {group!r}; expected an object with `targets`", hint=FULL_PRECISION
            )
        check_fields(group, _GROUP_FIELDS, named)
        scheme = _read_scheme(group, str(group.get("format") or values.get("format")), named)
        schemes |= dict.fromkeys(group["targets"], scheme)
    patterns = [t.removeprefix("re:") for t in (*schemes, *ignored) if t.startswith("re:")]
    check_patterns(patterns, where)
    caches = values.get("kv_cache_scheme") is not None
    return CompressedTensors(schemes, tuple(ignored), caches)


def _refuse_other_states(values: Mapping[str, Any], where: str) -> None:
    """Refuse what changes the numbers beside groups of codes."""
    status = values.get("quantization_status", "compressed")
    if status != "compressed":
        raise UnsupportedError(
            f"{where}: `quantization_status` is {status!r}; only `compressed` is read",
            hint="save it again with `save_compressed=True`",
        )
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        found = values.get(name)
        if found and found != {"format": "dense"}:
            method = found.get("format", found) if isinstance(found, dict) else found
            raise UnsupportedError(
                f"{where}: `{name}` of compressed-tensors, {method!r}, is not read",
                hint=FULL_PRECISION,
            )
    cache = values.get("kv_cache_scheme")
    if cache is not None:
        _check_static(cache, f"{where}: `kv_cache_scheme`", hint=_leave_out("kv_cache_scheme"))


def _read_scheme(group: Mapping[str, Any], stored_as: str, where: str) -> Scheme | None:
    weights = group.get("weights")
    if weights is None:
        if group.get("input_activations") or group.get("output_activations"):
            raise UnsupportedError(
                f"{where} rounds activations of matrices that hold numbers, which is not "
                "implemented",
                hint=_leave_out("input_activations"),
            )
        return None
    _refuse_format(stored_as, where)
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"{where}: `weights` is {weights!r}; expected an object", hint=FULL_PRECISION
        )
    check_fields(weights, _NUMBER_FIELDS, f"{where}: `weights`")
    if str(weights.get("type", "int")).lower() != "int" or weights.get("dynamic"):
        raise UnsupportedError(
            f"{where} has {weights.get('num_bits')}-bit weights of type {weights.get('type')!r}, "
            f"`dynamic` {weights.get('dynamic', False)!r}; integers that were rounded once are "
            "read",
            hint=FULL_PRECISION,
        )
    bits = read_bits(weights.get("num_bits", 8), where)
    if stored_as == AS_THEY_ARE and bits != 8:
        raise UnsupportedError(
            f"{where} stores codes of {bits} bits as `{AS_THEY_ARE}`; only 8 bits are read so",
            hint=f"save it again as `{PACKED}`",
        )
    if weights.get("actorder") not in _ORDERS:
        raise UnsupportedError(
            f"{where}: `actorder` {weights['actorder']!r} is not implemented", hint=FULL_PRECISION
        )
    rounds = []
    for name in ("input", "output"):
        rounding = group.get(f"{name}_activations")
        if rounding is not None:
            what = f"{where}: `{name}_activations`"
            _check_static(rounding, what, hint=_leave_out(f"{name}_activations"))
            rounds.append(name)
    return Scheme(
        bits=bits,
        group_size=_group_size(weights, where),
        symmetric=bool(weights.get("symmetric", True)),
        packed=stored_as == PACKED,
        rounds=tuple(rounds),
    )


def _refuse_format(stored_as: str, where: str) -> None:
    if stored_as not in (PACKED, AS_THEY_ARE):
        raise UnsupportedError(
            f"{where}: the format `{stored_as}` of compressed-tensors is not read; `{PACKED}` is",
            hint=FULL_PRECISION,
        )


def _group_size(weights: Mapping[str, Any], where: str) -> int | None:
    """Weights that share a scale; None for whole rows."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None and type(size) is int:
        strategy = "group" if size > 0 else "channel"
    if strategy == "channel":
        return None
    if strategy != "group":
        raise UnsupportedError(
            f"{where}: the strategy {strategy!r} is not implemented; `group` and `channel` are",
            hint=FULL_PRECISION,
        )
    if type(size) is not int or size < 1 or size % _GROUP_UNIT:
        raise UnsupportedError(
            f"{where}: `group_size` is {size!r}; expected a multiple of {_GROUP_UNIT}",
            hint=FULL_PRECISION,
        )
    return size


def _check_static(rounding: Any, what: str, *, hint: str) -> None:
    """Refuse activations that are not rounded to 8 bits by one scale of the file."""
    if not isinstance(rounding, dict):
        raise CheckpointError(f"{what} is {rounding!r}; expected an object", hint=hint)
    check_fields(rounding, _NUMBER_FIELDS, what)
    expected: dict[str, Any] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
    }
    expected |= {"dynamic": False}
    found = {n: v if rounding.get(n) is None else rounding[n] for n, v in expected.items()}
    if found != expected:
        said = ", ".join(f"`{name}` {value!r}" for name, value in found.items())
        raise UnsupportedError(
            f"{what} with {said} is not implemented; 8 bits and one static scale are", hint=hint
        )


def _leave_out(field: str) -> str:
    return f"set `{field}` to null in a copy of config.json to leave that rounding out"


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _names(target: str, module: str) -> bool:
    """Source: `match_name`."""
    if target.startswith("re:"):
        return match(target.removeprefix("re:"), module) is not None
    return target == module


def _codes(scheme: Scheme, module: str, key: str, *, width: int) -> Codes:
    size = scheme.group_size or width
    if width % size:
        raise CheckpointError(
            f"config.json: quantization_config has groups of {size} for `{module}`, whose rows "
            f"have {width} weights",
            hint="fetch config.json again, or start from the full-precision checkpoint",
        )
    return Codes(
        f"int{scheme.bits}",
        size,
        "fp32",
        (f"{key}_packed" if scheme.packed else key, f"{key}_scale"),
        zero_points="" if scheme.symmetric else f"{key}_zero_point",
        shape=f"{key}_shape" if scheme.packed else "",
        in_words=scheme.packed,
    )
