"""Edits of protobuf messages by their wire format, with the lengths around them made right.

Nothing is known of ONNX here but where it names a file of weights: a field that holds a message is
one whose bytes can be read as one.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from .byte_edits import edit_bytes
from .json_edits import INTEGERS, TEXTS

PLACES = ["../outside.bin", "/etc/passwd", "", ".", "model.onnx", "x" * 5000, "../../outside.bin"]
PLACES += ["embeddings.safetensors", "/proc/self/mem", "/dev/zero", "tied.safetensors", "a/../b"]
_OPERATORS = [b"Add", b"MatMul", b"Loop", b"Identity", b"Cast", b"Gather", b"ConstantOfShape"]
_OPERATORS += [b"MatMulNBits", b"Expand", b"Reshape", b"Range", b"Scan", b"TensorScatter", b"Nope"]


@dataclass(frozen=True)
class Field:
    """A field as it stands in a message.

    Attributes:
        value: an integer of wire type 0, 1 or 5; bytes of wire type 2.
    """

    number: int
    wire: int
    value: Any


def read_fields(data: bytes) -> list[Field]:
    """The fields of a message.

    Raises:
        ValueError, IndexError: it is none.
    """
    fields, at = [], 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError("no field")
        if wire == 0:
            value, at = _read_varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(wire, 0)
            if wire == 2:
                length, at = _read_varint(data, at)
            if at + length > len(data):
                raise ValueError("too long")
            piece, at = data[at : at + length], at + length
            value = piece if wire == 2 else int.from_bytes(piece, "little")
        fields.append(Field(number, wire, value))
    return fields


def write_fields(fields: list[Field]) -> bytes:
    """A message of fields."""
    parts = []
    for field in fields:
        parts.append(_varint(field.number << 3 | field.wire))
        if field.wire == 0:
            parts.append(_varint(field.value))
        elif field.wire == 2:
            parts += [_varint(len(field.value)), field.value]
        else:
            size = 8 if field.wire == 1 else 4
            parts.append((field.value % (1 << 8 * size)).to_bytes(size, "little"))
    return b"".join(parts)


def edit_protobuf(data: bytes, random: Random) -> bytes:
    """A message with a field changed, gone, doubled or moved."""
    if random.random() < 0.1:
        return edit_bytes(data, random)
    if random.random() < 0.1:
        place = random.choice(PLACES).encode()
        return _replaced(data, b"model.onnx.data", place, random.randrange(6))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = _edit_message(data, random, depth=0)
    return data


def _edit_message(data: bytes, random: Random, depth: int) -> bytes:
    try:
        fields = read_fields(data)
    except (ValueError, IndexError):
        return edit_bytes(data, random)
    if not fields:
        return data
    i = random.randrange(len(fields))
    if depth == 0:  # most of a model is its graph
        i = max(range(len(fields)), key=lambda n: len(write_fields([fields[n]])))
        if random.random() < 0.1:
            i = random.randrange(len(fields))
    field = fields[i]
    if field.wire == 2 and random.random() < (0.95 if depth == 0 else 0.6) and _is_message(field):
        fields[i] = replace(field, value=_edit_message(field.value, random, depth + 1))
        return write_fields(fields)
    match random.randrange(8):
        case 0:
            del fields[i]
        case 1:
            fields.insert(random.randrange(len(fields)), field)
        case 2:
            j = random.randrange(len(fields))
            fields[i], fields[j] = fields[j], fields[i]
        case 3:
            fields[i] = replace(field, number=random.choice((1, 2, 3, 4, 5, 7, 8, 20, 536870911)))
        case 4:
            j = random.randrange(len(fields))
            if fields[j].wire == field.wire:
                fields[i] = replace(field, value=fields[j].value)
        case _:
            fields[i] = replace(field, value=_another(field, random))
    return write_fields(fields)


def _another(field: Field, random: Random) -> Any:
    if field.wire != 2:
        near = (field.value + 1, max(0, field.value - 1), field.value * 2)
        return random.choice((*near, *INTEGERS)) % 2**64
    if random.random() < 0.3:
        return random.choice(_OPERATORS)
    if random.random() < 0.5:
        return edit_bytes(field.value, random)
    return random.choice(TEXTS).encode()


def _is_message(field: Field) -> bool:
    try:
        return bool(read_fields(field.value))
    except (ValueError, IndexError):
        return False


def _replaced(data: bytes, old: bytes, new: bytes, skip: int) -> bytes:
    """A message in which strings that are `old`, from the one after `skip` on, are `new`."""
    left = [skip]

    def walk(message: bytes, depth: int) -> bytes:
        if old not in message or depth > 8:
            return message
        try:
            fields = read_fields(message)
        except (ValueError, IndexError):
            return message
        for i, field in enumerate(fields):
            if field.wire == 2 and field.value == old:
                left[0] -= 1
                if left[0] < 0:
                    fields[i] = replace(field, value=new)
            elif field.wire == 2:
                fields[i] = replace(field, value=walk(field.value, depth + 1))
        return write_fields(fields)

    return walk(data, 0)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value % 2**64, at
        if shift > 63:
            raise ValueError("no varint")


def _varint(value: int) -> bytes:
    value %= 2**64
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)
