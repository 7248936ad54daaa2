"""Edits of safetensors files: headers, their length, and what tensors hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from .byte_edits import edit_bytes
from .json_edits import INTEGERS, Pairs, any_value, dump, edit_value

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "U64", "F8_E4M3", "F4", ""]
_NUMBERS = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\x7f\x7f"]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a sound file.

    Raises:
        ValueError: it is none.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("no object")
    return header, data[8 + size :]


def join(header: str, tensors: bytes, *, size: int = 0) -> bytes:
    """A file with a header of at least `size` bytes."""
    raw = header.encode("utf-8", "surrogatepass").ljust(size)
    return len(raw).to_bytes(8, "little") + raw + tensors


def edit_safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file with a header or tensors that are changed."""
    try:
        header, tensors = split(data)
    except (ValueError, RecursionError):
        return edit_bytes(data, random)
    size = int.from_bytes(data[:8], "little")
    match random.randrange(10):
        case 0:
            return random.choice(INTEGERS).to_bytes(32, "little", signed=True)[:8] + data[8:]
        case 1:
            change = random.choice((-1, 1, 8, -8, 100_000))
            return max(0, size + change).to_bytes(8, "little") + data[8:]
        case 2:
            return data[: 8 + size] + edit_bytes(tensors, random)
        case 3:
            return data[: 8 + size] + _with_odd_numbers(tensors, random)
        case 4:
            return join(dump(edit_value(header, random)), tensors, size=size)
        case _:
            edited: Any = header
            for _ in range(random.choice((1, 1, 2))):
                if isinstance(edited, dict) and not isinstance(edited, Pairs):
                    edited = _edit_entry(edited, random)
            return join(dump(edited), tensors, size=size)


def _with_odd_numbers(tensors: bytes, random: Random) -> bytes:
    """Infinities, what is no number, and huge ones, among the numbers of tensors."""
    changed = bytearray(tensors)
    for _ in range(random.choice((1, 3, 50))):
        at = random.randrange(max(1, len(tensors) // 4)) * 4
        changed[at : at + 4] = random.choice(_NUMBERS)
    return bytes(changed[: len(tensors)])


def _edit_entry(header: dict[str, Any], random: Random) -> Any:
    names = [name for name, entry in header.items() if isinstance(entry, dict)]
    if not names:
        return edit_value(header, random)
    name = random.choice(names)
    entry = dict(header[name])
    edits: list[Callable[[], Any]] = [
        lambda: header | {name: entry | {"dtype": random.choice(DTYPES)}},
        lambda: header | {name: entry | {"shape": _shape(entry.get("shape"), random)}},
        lambda: header | {name: entry | {"shape": _shape(entry.get("shape"), random)}},
        lambda: header | {name: entry | {"data_offsets": _offsets(entry, random)}},
        lambda: header | {name: entry | {"data_offsets": _offsets(entry, random)}},
        lambda: header | {name: header[random.choice(names)]},
        lambda: {k: v for k, v in header.items() if k != name},
        lambda: {(f"{k}.x" if k == name else k): v for k, v in header.items()},
        lambda: Pairs([*header.items(), (name, header[random.choice(names)])]),
        lambda: header | {"__metadata__": any_value(random)},
        lambda: header | {f"x{random.randrange(3)}": any_value(random)},
        lambda: Pairs([*header.items()][::-1]),
    ]
    return random.choice(edits)()


def _shape(shape: Any, random: Random) -> Any:
    """Another shape, of as many elements or of others."""
    if not isinstance(shape, list) or not shape or not all(type(n) is int for n in shape):
        return any_value(random)
    i = random.randrange(len(shape))
    count = 1
    for length in shape:
        count *= length
    choices = [shape[::-1], [count], [*shape, 1], [1, *shape], [], [0, *shape], shape[:-1]]
    choices += [[*shape[:i], random.choice(INTEGERS), *shape[i + 1 :]] for _ in range(4)]
    choices += [[2**32, 2**32], [2**63, 2], [1] * 400, [*shape, 0]]
    return random.choice(choices)


def _offsets(entry: dict[str, Any], random: Random) -> Any:
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2:
        return any_value(random)
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        return any_value(random)
    by, far = random.choice((1, 2, 4, 8, 64, -1, -4, -64)), random.choice(INTEGERS)
    choices = [[begin + by, end + by], [begin, end + by], [begin - by, end], [end, begin]]
    choices += [[begin, far], [far, far], [0, end - begin], [begin], [begin, end, end]]
    choices += [[far, far + end - begin], [begin, begin]]
    return random.choice(choices)
