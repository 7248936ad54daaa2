"""Read a config field by field, so that nothing in it is overlooked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pleexport.errors import CheckpointError, UnsupportedError

# What to do about a value that cannot be, and about one that is not implemented.
AS_PUBLISHED = "compare the config with the one that the model was published with"
NOT_THIS_VARIANT = "this variant of the architecture cannot be exported yet; others of its kind can"

# No size in a config comes near it, and products of two stay exact.
LARGEST_INTEGER = 2**31 - 1
# Of what a model has parts for, each of which takes time and memory: five times the most known.
_LARGEST = {"num_hidden_layers": 1024, "altup_num_inputs": 64}
# Fields that do not change what a trained model computes.
HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_length",
        "min_length",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "transformers_weights",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


# Fields that do not matter when they are false.
HARMLESS_IF_FALSE = frozenset(
    {
        "add_cross_attention",
        "do_sample",
        "early_stopping",
        "output_scores",
        "remove_invalid_values",
        "return_dict_in_generate",
        "tie_encoder_decoder",
    }
)


class ConfigReader:
    """Typed access to one config object; every field that is read is remembered.

    Args:
        values: the JSON object.
        where: how messages name it, e.g. "config.json: text_config".
    """

    def __init__(self, values: dict[str, Any], *, where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value of a field."""
        self._read.add(name)
        return self._values.get(name, default)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        """An integer field of at least `minimum`."""
        value, largest = self._required(name, default), _LARGEST.get(name, LARGEST_INTEGER)
        if type(value) is not int or not minimum <= value <= largest:
            raise self.malformed(name, f"an integer from {minimum} to {largest}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._required(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max
        ):
            raise self.malformed(name, "a number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(name, default)
        if value <= 0:
            raise self.malformed(name, "a positive number")
        return value

    def optional_positive(self, name: str) -> float | None:
        """A finite number above zero, or None where the field is missing or null."""
        self._read.add(name)
        return self.positive(name) if self.has(name) else None

    def flag(self, name: str, *, default: bool) -> bool:
        """A boolean field; null counts as the default."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.malformed(name, "true or false")
        return value

    def per_layer(self, name: str, count: int, kind: type | tuple[type, ...]) -> list[Any]:
        """A list with one value for each of `count` layers."""
        value = self._required(name, None)
        if not isinstance(value, list) or len(value) != count:
            raise self.malformed(name, f"a list of {count} values, one for each layer")
        if not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            raise self.malformed(name, "values of one type")
        return value

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """A string field that is one of the implemented values."""
        value = self._required(name, None)
        if value not in allowed:
            raise UnsupportedError(
                f"{self._where}: `{name}` is {value!r}; implemented: {', '.join(allowed)}",
                hint=NOT_THIS_VARIANT,
            )
        return str(value)

    def require(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuse a field that asks for anything but the `allowed` values."""
        value = self.get(name)
        if value not in allowed:
            raise UnsupportedError(
                f"{self._where}: `{name}` = {value!r} is not implemented", hint=NOT_THIS_VARIANT
            )

    def malformed(self, name: str, expected: str) -> CheckpointError:
        """The error for a field with an unusable value."""
        return CheckpointError(
            f"{self._where}: `{name}` is {self._values.get(name)!r}; expected {expected}",
            hint=AS_PUBLISHED,
        )

    def finish(self) -> None:
        """Refuse fields that nobody has read and that are not known to be harmless.

        Raises:
            UnsupportedError: names them.
        """
        unknown = sorted(
            name
            for name, value in self._values.items()
            if name not in self._read
            and name not in HARMLESS
            and value is not None
            and not (value is False and name in HARMLESS_IF_FALSE)
        )
        if "quantization_config" in unknown:
            raise UnsupportedError(
                f"{self._where}: `quantization_config` says that the weights are quantized already",
                hint="start from the full-precision checkpoint that it was made from",
            )
        if unknown:
            raise UnsupportedError(
                f"{self._where}: unknown fields {', '.join(f'`{n}`' for n in unknown)} might "
                "change what the model computes",
                hint="remove them from a copy of config.json if they do not",
            )

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where}: `{name}` is missing", hint=AS_PUBLISHED)
        return value
