"""What adapter_config.json says that changes the merged weights; all else is refused or harmless.

Source: peft 0.21 `tuners/lora/config.py`, `tuners/lora/model.py`, `utils/other.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pleexport.checkpoint.patterns import check_pattern, match
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.whole_file import read_whole

ADAPTER_CONFIG = "adapter_config.json"
_LARGEST = float(np.finfo(np.float32).max)
LORA, TOKENS = "LORA", "TRAINABLE_TOKENS"
MERGE_ELSEWHERE = (
    "merge it where it was trained (`merge_and_unload()`, then `save_pretrained(DIR)`), and build "
    "from that folder"
)
AS_SAVED = "save the adapter again with `save_pretrained`, or fetch its folder again"
# What is read below, or says how the adapter was trained and nothing about what it computes. Names
# of modules are those of the tensors in the file.
_READ_OR_HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        # Linear layers are `[out, in]` here, and PEFT takes the flag back for them.
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "token_indices",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
# Forms of LoRA that are no sum of a matrix and a product, by the field that asks for them.
_FORMS = {
    "alora_invocation_tokens": "aLoRA, which acts on some tokens of a text only",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "kasa_config": "KaSA, which takes singular values out of the base",
    "layer_replication": "layer replication, which makes a deeper model",
    "monteclora_config": "MonteCLoRA, which draws weights at random",
    "target_parameters": "LoRA of parameters that are no module's weight",
    "use_bdlora": "BD-LoRA, whose matrices are made of blocks",
    "use_qalora": "QA-LoRA, which adds to quantized weights",
    "velora_config": "VeLoRA, whose tensors are compressed",
}
# How A and B began. Others take their product out of the base when an adapter is made.
_STARTS_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that merging depends on.

    Attributes:
        where: what errors call it.
        base: `base_model_name_or_path`: a folder, or a name on a hub; "" where it is not said.
        kind: `peft_type`, one of the two that are merged.
        saved: ends of names of modules that are saved whole (`modules_to_save`).
        token_indices: ids of rows that were trained, by the end of a module's name; under "" those
            of the input embedding.
    """

    where: str
    base: str
    kind: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    saved: tuple[str, ...]
    token_indices: Mapping[str, list[int]]

    def described(self) -> str:
        """What it is, as people say it, e.g. "rank-stabilized LoRA of rank 16"."""
        if self.kind == TOKENS:
            return "trained tokens"
        form = "DoRA" if self.dora else "LoRA"
        form = f"rank-stabilized {form}" if self.rank_stabilized else form
        ranks = sorted({self.rank, *self.ranks.values()})
        return f"{form} of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices, by its name in the model that was trained."""
        return self.ranks.get(_pattern_of(module, self.ranks), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alphas.get(_pattern_of(module, self.alphas), self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether a module has a whole copy of its own."""
        return any(module.endswith(end) for end in self.saved)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read a folder's adapter_config.json.

    Raises:
        CheckpointError: it is missing or malformed.
        UnsupportedError: it asks for what cannot be merged.
    """
    where = f"`{folder / ADAPTER_CONFIG}`"
    values = _read_json(folder / ADAPTER_CONFIG)
    _refuse(values, where)
    reader = _Fields(values, where)
    is_lora = values["peft_type"] == LORA
    indices = values.get("trainable_token_indices" if is_lora else "token_indices")
    config = AdapterConfig(
        where=where,
        base=values.get("base_model_name_or_path") or "",
        kind=values["peft_type"],
        rank=reader.integer("r") if is_lora else 1,
        alpha=reader.number("lora_alpha") if is_lora else 1.0,
        ranks=reader.pattern("rank_pattern", whole=True),
        alphas=reader.pattern("alpha_pattern"),
        rank_stabilized=bool(values.get("use_rslora")),
        dora=bool(values.get("use_dora")),
        saved=tuple(reader.names("modules_to_save")),
        token_indices=reader.token_indices(indices),
    )
    if not isinstance(config.base, str):
        raise reader.malformed("base_model_name_or_path", "a name")
    return config


def _refuse(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{where} has `peft_type` {kind!r}; expected a name such as {LORA}", hint=AS_SAVED
        )
    if kind not in (LORA, TOKENS):
        raise UnsupportedError(
            f"{where} is of an adapter of type {kind}; only {LORA} and {TOKENS} are merged",
            hint=MERGE_ELSEWHERE,
        )
    for name, form in _FORMS.items():
        if values.get(name):
            raise UnsupportedError(
                f"{where} asks for {form} (`{name}`); that cannot be merged here",
                hint=MERGE_ELSEWHERE,
            )
    start = str(values.get("init_lora_weights", "")).lower()
    if start.startswith(_STARTS_FROM_BASE):
        raise UnsupportedError(
            f"{where} says `init_lora_weights` {start}, which changes the base before the adapter "
            "is trained; that base is not in the folder",
            hint="save the adapter with `path_initial_model_for_weight_conversion`, which makes a "
            "plain LoRA of it",
        )
    unknown = sorted(
        name
        for name, value in values.items()
        if name not in _READ_OR_HARMLESS and name not in _FORMS and value
    )
    if unknown:
        raise UnsupportedError(
            f"{where} has unknown fields {', '.join(f'`{n}`' for n in unknown)}, which might "
            "change what the adapter computes",
            hint=f"remove them from a copy if they do not; otherwise {MERGE_ELSEWHERE}",
        )


class _Fields:
    """Typed access to the fields of one adapter_config.json."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def malformed(self, name: str, expected: str) -> CheckpointError:
        """The error for a field that cannot be used."""
        return CheckpointError(
            f"{self._where} has `{name}` {self._values.get(name)!r}; expected {expected}",
            hint=AS_SAVED,
        )

    def integer(self, name: str) -> int:
        """An integer above zero."""
        value = self._values.get(name)
        if type(value) is not int or value < 1:
            raise self.malformed(name, "a whole number above 0")
        return value

    def number(self, name: str) -> float:
        """A number that float32 holds."""
        value = self._values.get(name)
        if not _is_number(value):
            raise self.malformed(name, "a number that float32 holds")
        return float(value)  # type: ignore[arg-type]

    def names(self, name: str) -> list[str]:
        """A list of names; none where it is null."""
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self.malformed(name, "a list of names")
        return value

    def pattern(self, name: str, *, whole: bool = False) -> dict[str, Any]:
        """A map from regular expressions to numbers, or to whole ones above zero."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict) or not all(
            (type(v) is int and v > 0) if whole else _is_number(v) for v in value.values()
        ):
            kind = "whole numbers above 0" if whole else "numbers that float32 holds"
            raise self.malformed(name, f"a map from names of modules to {kind}")
        for key in value:
            check_pattern(key, f"{self._where}, `{name}`", hint=AS_SAVED)
        return value

    def token_indices(self, value: Any) -> dict[str, list[int]]:
        """Ids of trained tokens by module."""
        by_module = value if isinstance(value, dict) else {"": value} if value else {}
        for ids in by_module.values():
            if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise CheckpointError(
                    f"{self._where} has trained token indices {ids!r}; expected a list of ids",
                    hint=AS_SAVED,
                )
        return by_module


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, in which adapters are merged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST


def _pattern_of(module: str, patterns: Mapping[str, object]) -> str:
    """The first pattern that a module's name ends with; source: peft `get_pattern_key`."""
    found = (key for key in patterns if match(rf"(.*\.)?({key})$", module))
    return next(found, module)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_whole(path))
    except FileNotFoundError as err:
        raise CheckpointError(
            f"`{path}` does not exist, so `{path.parent}` is no adapter",
            hint=f"pass the folder that holds {ADAPTER_CONFIG} and adapter_model.safetensors",
        ) from err
    except OSError as err:
        raise CheckpointError(
            f"`{path}` cannot be read: {err.strerror}", hint="check the file and its permissions"
        ) from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"`{path}` is not valid JSON ({err})", hint=AS_SAVED) from err
    if not isinstance(values, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object", hint=AS_SAVED)
    return values
