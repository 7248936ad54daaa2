"""Edits of `.pth` files: the archive, its names, and the pickle that says what it holds."""

from __future__ import annotations

import io
import pickle
import zipfile
from random import Random

from .byte_edits import edit_bytes
from .json_edits import INTEGERS

_CALLS = [
    b"cos\nsystem\n(S'touch ran'\ntR.",
    b'cbuiltins\neval\n(S\'open("ran","w")\'\ntR.',
    b"cbuiltins\nexec\n(S'1'\ntR.",
    b"(lp0\n" + b"I1\na" * 5000 + b".",
    b"\x80\x02" + b"(" * 100_000 + b".",
    b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
    b"\x80\x02]q\0h\0a.",  # a list that holds itself
    b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
    b"ccollections\nOrderedDict\n)R.",
    b"I" + b"9" * 5000 + b"\n.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.",
    b"N.",
    b"",
]
_NAMES = [
    "../x",
    "/etc/x",
    "a/../../x",
    "x" * 2000,
    "archive/data.pkl",
    "archive/data/0",
    "\0",
    "é",
]


def edit_pth(data: bytes, random: Random) -> bytes:
    """A `.pth` file with its archive, pickle or tensors changed."""
    kind = random.randrange(10)
    if kind == 0:
        return edit_bytes(data, random)
    if kind == 1:
        return _CALLS[random.randrange(len(_CALLS))]
    if kind == 2:
        return _at_the_end(data, random)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # it was edited before, and zipfile raises many kinds
        return edit_bytes(data, random)
    pickled = next((i for i, (n, _) in enumerate(entries) if n.endswith("data.pkl")), 0)
    name, content = entries[pickled]
    i = random.randrange(len(entries))
    compress = zipfile.ZIP_STORED
    match kind:
        case 3:
            entries[pickled] = name, random.choice(_CALLS)
        case 4:
            entries[pickled] = name, edit_bytes(content, random)
        case 5 | 6:
            entries[pickled] = name, _edit_numbers(content, random)
        case 7:
            entries[i] = random.choice(_NAMES), entries[i][1]
        case 8:
            entries[i] = entries[i][0], edit_bytes(entries[i][1], random)
        case _:
            match random.randrange(4):
                case 0:
                    del entries[i]
                case 1:
                    entries.append(entries[i])
                case 2:
                    compress = zipfile.ZIP_DEFLATED
                case _:  # a bomb
                    compress = zipfile.ZIP_DEFLATED
                    entries[i] = entries[i][0], b"\0" * (64 << 20)
    return _archive(entries, compress)


def _archive(entries: list[tuple[str, bytes]], compress: int) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compress) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name.replace("\0", "") or "x")  # with one date always
            info.compress_type = compress
            if info.filename not in archive.NameToInfo:
                archive.writestr(info, content)
    return written.getvalue()


def _at_the_end(data: bytes, random: Random) -> bytes:
    """Damage in the archive's list of its entries."""
    at = max(0, len(data) - random.choice((22, 64, 400, 2000)))
    return data[:at] + edit_bytes(data[at:], random)


def _edit_numbers(content: bytes, random: Random) -> bytes:
    """A pickle whose integers or strings are changed: shapes, strides, offsets, sizes, names."""
    import pickletools

    try:
        places = [(at, op.name, arg) for op, arg, at in pickletools.genops(content)]
    except Exception:  # as above
        return edit_bytes(content, random)
    ends = [*(at for at, _, _ in places[1:]), len(content)]
    chosen = [n for n, (_, name, _) in enumerate(places) if name.startswith(("BININT", "BINUNI"))]
    if not chosen:
        return edit_bytes(content, random)
    n = random.choice(chosen)
    at, name, arg = places[n]
    if name.startswith("BININT"):
        value = random.choice((*INTEGERS, arg + 1, arg * 2, -arg))
        new = pickle.dumps(value, protocol=2)[2:-1]
    else:
        text = random.choice((str(arg) + "x", "", "../x", "cuda:0", "meta", "0", "1", "é" * 3000))
        new = pickle.dumps(text, protocol=2)[2:-1]
        new = new[: new.index(b"q\0")] if new.endswith(b"q\0") else new
    return content[:at] + new + content[ends[n] :]
