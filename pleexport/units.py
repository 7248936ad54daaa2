"""Numbers of bytes as people read them."""

from __future__ import annotations

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def size_text(nbytes: int) -> str:
    """Bytes in decimal units, with three digits or more."""
    for unit, scale in _UNITS:
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
