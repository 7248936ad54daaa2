"""Damage that knows nothing of a format: bits, pieces and lengths."""

from __future__ import annotations

from random import Random

_WORDS = [b"\0", b"\xff", b"\x80", b"{", b'"', b"\n", b"../", b"\xed\xa0\x80", b"\xef\xbb\xbf"]


def edit_bytes(data: bytes, random: Random) -> bytes:
    """The content of a file with one piece of it changed, moved, added or gone."""
    kind = random.randrange(10)
    at, length = _place(data, random)
    piece = data[at : at + length]
    match kind:
        case 0 | 1 | 2:
            changed = bytearray(data)
            for _ in range(random.choice((1, 1, 1, 2, 8))):
                if changed:
                    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
            return bytes(changed)
        case 3:
            return data[:at]
        case 4:
            return data + random.choice((random.randbytes(length), b"\0" * length, piece))
        case 5:
            return data[:at] + random.choice(_WORDS) * random.choice((1, 1, 9)) + data[at:]
        case 6:
            return data[:at] + data[at + length :]
        case 7:
            return data[:at] + piece + data[at:]
        case 8:
            return data[:at] + random.choice((b"\0", b"\xff")) * len(piece) + data[at + length :]
        case _:
            return data[:at] + random.randbytes(len(piece)) + data[at + length :]


def _place(data: bytes, random: Random) -> tuple[int, int]:
    """Where, and how many bytes; more often near the beginning, where headers are."""
    end = len(data) if random.random() < 0.5 else min(len(data), 512)
    return random.randrange(end + 1), random.choice((1, 1, 2, 4, 8, 64, 1024, 70_000))
