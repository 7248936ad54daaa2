"""Sizes: how many groups cover a width, the next multiple, and bytes as people read them."""

from __future__ import annotations

import re

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def groups(width: int, group_size: int) -> int:
    """How many groups cover `width` elements; the last may be shorter."""
    return -(-width // group_size)


def align(position: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not below `position`."""
    return -(-position // alignment) * alignment


def size_text(nbytes: int) -> str:
    """Bytes in decimal units, with three digits or more."""
    for unit, scale in _UNITS:
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


def parse_size(text: str) -> int:
    """The bytes that a text such as "2.2GB", "900 kB" or "1000000" says.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kMG]?)B?\s*", text)
    if found is None:
        raise ValueError(text)
    scales = {name.removesuffix("B"): scale for name, scale in _UNITS} | {"": 1}
    return round(float(found[1]) * scales[found[2]])
