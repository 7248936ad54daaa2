"""What a dex file defines and refers to.

Source: the format as https://source.android.com/docs/core/runtime/dex-format describes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NO_INDEX = 0xFFFF_FFFF
CALL_SITES = 0x0007


@dataclass
class Class:
    """A class: what it extends, and its members as `name(types)type` and `name#type`."""

    parents: list[str]
    members: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Dex:
    """Classes by name, members that code refers to, and how many `invoke-custom` there are.

    Names have slashes: `java/lang/Object`. A reference is the class and the member.
    """

    classes: Mapping[str, Class]
    references: frozenset[tuple[str, str]]
    call_sites: int


def read_dex(path: Path) -> Dex:
    """Reads the tables of a dex file; code is not looked at, as all that it names is in them."""
    return _Reader(path.read_bytes()).dex()


class _Reader:
    def __init__(self, data: bytes) -> None:
        assert data[:4] == b"dex\n"
        self.data = data
        self.strings = [self._string(at) for (at,) in self._table(56, "<I")]
        self.types = [self.strings[i] for (i,) in self._table(64, "<I")]
        protos = self._table(72, "<III")
        self.protos = [
            f"({''.join(self._type_list(parameters))}){self.types[result]}"
            for _, result, parameters in protos
        ]
        self.fields = [
            (_name(self.types[owner]), f"{self.strings[name]}#{self.types[kind]}")
            for owner, kind, name in self._table(80, "<HHI")
        ]
        self.methods = [
            (_name(self.types[owner]), self.strings[name] + self.protos[proto])
            for owner, proto, name in self._table(88, "<HHI")
        ]

    def dex(self) -> Dex:
        classes = {}
        for own, _, parent, interfaces, _, _, data, _ in self._table(96, "<IIIIIIII"):
            parents = [self.types[parent]] if parent != NO_INDEX else []
            found = Class([_name(p) for p in parents + self._type_list(interfaces)])
            if data:
                found.members.update(self._members(data))
            classes[_name(self.types[own])] = found
        # Methods of arrays are those of objects.
        references = frozenset(
            (owner, member) for owner, member in self.fields + self.methods if owner[0] != "["
        )
        return Dex(classes, references, self._map().get(CALL_SITES, 0))

    def _table(self, at: int, form: str) -> list[tuple[int, ...]]:
        count, begin = struct.unpack_from("<II", self.data, at)
        size = struct.calcsize(form)
        return [struct.unpack_from(form, self.data, begin + i * size) for i in range(count)]

    def _string(self, at: int) -> str:
        _, at = self._uleb(at)
        return self.data[at : self.data.index(0, at)].decode("utf-8", "replace")

    def _type_list(self, at: int) -> list[str]:
        if at == 0:
            return []
        (count,) = struct.unpack_from("<I", self.data, at)
        return [self.types[i] for i in struct.unpack_from(f"<{count}H", self.data, at + 4)]

    def _members(self, at: int) -> Iterator[str]:
        counts = []
        for _ in range(4):
            count, at = self._uleb(at)
            counts.append(count)
        for kind, count in enumerate(counts):
            index = 0
            for _ in range(count):
                step, at = self._uleb(at)
                index += step
                for _ in range(1 if kind < 2 else 2):  # flags, and of methods where the code is
                    _, at = self._uleb(at)
                yield (self.fields if kind < 2 else self.methods)[index][1]

    def _uleb(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7

    def _map(self) -> dict[int, int]:
        (begin,) = struct.unpack_from("<I", self.data, 52)
        (count,) = struct.unpack_from("<I", self.data, begin)
        items = (struct.unpack_from("<HHII", self.data, begin + 4 + 12 * i) for i in range(count))
        return {kind: size for kind, _, size, _ in items}


def _name(descriptor: str) -> str:
    return descriptor[1:-1] if descriptor[0] == "L" else descriptor
