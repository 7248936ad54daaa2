"""Edits of JSON that know its grammar, written with an encoder that also writes what is no JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from .byte_edits import edit_bytes

INTEGERS = [0, 1, -1, 2, 3, 127, 255, 256, 4096, 65_537, 1_000_003, 2**31 - 1, 2**31, 2**32]
INTEGERS += [2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31)]
INTEGERS += [-(2**63), -(2**63) - 1, -(10**30)]
FLOATS = ["1.5", "-0.0", "1e308", "1e309", "-1e309", "1e-400", "NaN", "Infinity", "-Infinity"]
FLOATS += ["1e5", "3.0", "0.1", "9007199254740993.0"]
TEXTS = ["", " ", "x", "0", "-1", "nan", "none", "null", "true", "a" * 100_000, "é", "\U0001f642"]
TEXTS += ["../x", "../outside.bin", "/etc/passwd", "..", ".", "a/b", "a\\b", "\0", "\x1b[31m", "\n"]
TEXTS += ["CON", "model.onnx", "manifest.json", "int4", "bfloat16", "float8_e4m3fn", "F4", "uint64"]
TEXTS += ["sliding_attention", "gemma4", "linear", "yarn", "{{ 9 }}", "%s", "{}", "[" * 2000]


class Raw(str):
    """Text that stands in a file as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may come twice."""


def dump(value: Any) -> str:
    """JSON of a value, of `Raw` and of `Pairs`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{dump(str(k))}: {dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def any_value(random: Random, *, alone: bool = True) -> Any:
    """A value that some reader may not expect; a list of others only where it stands alone."""
    match random.randrange(9 if alone else 6):
        case 0 | 1:
            return random.choice(INTEGERS)
        case 2:
            return Raw(random.choice(FLOATS))
        case 3:
            return random.choice(TEXTS)
        case 4:
            return random.choice([None, True, False])
        case 5:
            return random.choice([[], {}, [[]], [{}], {"": None}, [None], [0, "x"], {"a": {}}])
        case 6:
            depth = random.choice((30, 900, 5000, 100_000))
            return Raw(
                random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
            )
        case 7:
            return Raw(
                random.choice(('"\\ud800"', '"\\udfff\\ud800"', "9" * 5000, "-", "+1", "01"))
            )
        case _:
            return [any_value(random, alone=False) for _ in range(random.choice((1, 2, 5, 300)))]


def edit_json(data: bytes, random: Random, pool: Sequence[tuple[str, Any]] = ()) -> bytes:
    """A JSON file with something of it changed; what is no JSON has its bytes changed.

    Args:
        pool: names and values of other files, which may be put in.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return edit_bytes(data, random)
    if random.random() < 0.06:
        return _as_a_whole(data, value, random)
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        value = edit_value(value, random, pool)
    return dump(value).encode("utf-8", "surrogatepass")


def _as_a_whole(data: bytes, value: Any, random: Random) -> bytes:
    match random.randrange(7):
        case 0:
            return b"\xef\xbb\xbf" + data
        case 1:
            return data.decode("utf-8", "replace").encode(random.choice(("utf-16", "utf-32-be")))
        case 2:
            return data + random.choice((b"}", b"x", b"\0", data, b"// end"))
        case 3:
            return dump([value]).encode("utf-8", "surrogatepass")
        case 4:
            return dump(any_value(random)).encode("utf-8", "surrogatepass")
        case 5:
            return b""
        case _:
            return dump(
                {"text_config": value, **(value if isinstance(value, dict) else {})}
            ).encode("utf-8", "surrogatepass")


def edit_value(value: Any, random: Random, pool: Sequence[tuple[str, Any]] = ()) -> Any:
    """A value with one node changed, found by walking down at random."""
    children = len(value) if isinstance(value, (dict, list)) and not isinstance(value, Pairs) else 0
    if not children or random.random() < 0.2:
        return _edit_node(value, random, pool)
    if isinstance(value, list):
        i = random.randrange(children)
        return [*value[:i], edit_value(value[i], random, pool), *value[i + 1 :]]
    key = random.choice(list(value))
    return {k: edit_value(v, random, pool) if k == key else v for k, v in value.items()}


def _edit_node(value: Any, random: Random, pool: Sequence[tuple[str, Any]]) -> Any:
    if isinstance(value, dict) and not isinstance(value, Pairs) and random.random() < 0.9:
        return _edit_object(value, random, pool)
    if isinstance(value, list) and not isinstance(value, Pairs) and random.random() < 0.85:
        return _edit_list(value, random)
    if type(value) is int and random.random() < 0.5:
        return random.choice((value + 1, value - 1, 2 * value, -value, value // 2, float(value)))
    if isinstance(value, str) and random.random() < 0.4:
        i = random.randrange(len(value) + 1)
        part = random.choice((value[:i], value + value, value[:i] + "x" + value[i:], value.upper()))
        return random.choice((part, f"../{value}", f"{value}/", [value], value[::-1]))
    if random.random() < 0.1:
        return random.choice((str(value), [value], {"a": value}))
    return any_value(random)


def _edit_object(value: dict[str, Any], random: Random, pool: Sequence[tuple[str, Any]]) -> Any:
    names = list(value)
    kind = random.randrange(8)
    if kind == 0 or not names:
        return value | {random.choice(("x", "", "__class__", "\0", "a" * 5000)): any_value(random)}
    if kind in {1, 2} and pool:
        name, other = random.choice(pool)
        return value | {name: other if random.random() < 0.5 else any_value(random)}
    name = random.choice(names)
    match kind:
        case 3:
            return {k: v for k, v in value.items() if k != name}
        case 4:
            return {(f"{k}x" if k == name else k): v for k, v in value.items()}
        case 5:
            return Pairs([*value.items(), (name, random.choice((value[name], any_value(random))))])
        case 6:
            return value | {name: value[random.choice(names)]}
        case _:
            return value | {name: any_value(random)}


def _edit_list(value: list[Any], random: Random) -> list[Any]:
    if not value:
        return [any_value(random)]
    i, j = random.randrange(len(value)), random.randrange(len(value))
    match random.randrange(6):
        case 0:
            return [*value[:i], *value[i + 1 :]]
        case 1:
            return [*value[:i], value[j], *value[i:]]
        case 2:
            return value[::-1]
        case 3:
            return value * random.choice((2, 50))
        case 4:
            return [*value[:i], value[j], *value[i + 1 :]]
        case _:
            return [*value, any_value(random)]
