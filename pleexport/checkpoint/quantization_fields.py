"""Fields that the methods of a `quantization_config` share, and what to use in place of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pleexport.checkpoint.patterns import check_pattern
from pleexport.errors import UnsupportedError

BITS = (2, 4, 8)
FULL_PRECISION = "start from the full-precision checkpoint that it was made from"


def read_bits(value: Any, where: str) -> int:
    """The bits of codes, 2, 4 or 8.

    Raises:
        UnsupportedError: anything else.
    """
    if value not in BITS or isinstance(value, bool):
        raise UnsupportedError(
            f"{where}: `num_bits` is {value!r}; implemented: {', '.join(map(str, BITS))}",
            hint=FULL_PRECISION,
        )
    return int(value)


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        CheckpointError: names it.
    """
    for pattern in patterns:
        check_pattern(pattern, where, hint=FULL_PRECISION)


def check_fields(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse fields that nobody knows.

    Raises:
        UnsupportedError: names them.
    """
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise UnsupportedError(
            f"{where}: unknown fields {', '.join(f'`{n}`' for n in unknown)} might change what "
            "the model computes",
            hint="remove them from a copy of config.json if they do not",
        )
