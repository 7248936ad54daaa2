"""Small changes of a sound bundle, each of which breaks one rule."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import test_blob
import test_tied
from resealed import CHUNK, checksum, header_of

import pleexport
from pleexport.errors import PleexportError

BLOB, TIED, GRAPH, WEIGHTS = (
    "embeddings.safetensors",
    "tied.safetensors",
    "model.onnx",
    "model.onnx.data",
)
MANIFEST, CHECKSUMS = "manifest.json", "checksums.json"
# Equal bytes between two changes that are told as one.
_GAP = 8
# Rules whose numbers are told; of files that were mixed (T-11), the sentence tells enough.
_TELLS = r"B-\d\d|T-0\d"
Files = dict[str, bytes]
Change = Callable[[Path], object]


def malformed(bundle: Path) -> list[dict[str, Any]]:
    """Each case: its name, rule, changes, and when a runner finds out."""
    cases = []
    for name, rule, change, lookup in _cases():
        with TemporaryDirectory() as scratch:
            copy = Path(shutil.copytree(bundle, Path(scratch) / "bundle"))
            change(copy)
            before, after = _files(bundle), _files(copy)
            when = {"when": "open"} if lookup is None else {"when": "lookup", "id": lookup}
            message = told(copy, lookup)
            if message is None or (re.match(_TELLS, rule) and f"({rule})" not in message):
                # A rule of files that this bundle cannot break, as it has no such part.
                print(f"left out: {name} ({message})")
                continue
            message = message.replace(str(copy), "BUNDLE")
            changes = [*edits(before, after)]
            assert _files_after(before, changes) == after
            cases.append(
                {"name": name, "rule": rule, **when, "exit_code": 2, "message": message}
                | {"changes": changes}
            )
    return cases


def told(bundle: Path, lookup: int | None) -> str | None:
    """What the Python runner says of a bundle; None where it finds nothing."""
    try:
        runner = pleexport.Runner(bundle, threads=1)
        if lookup is not None:
            runner.blob.lookup(runner.blob.row_ids([lookup - 1, lookup + 1]))
            runner.logits([lookup])
    except PleexportError as err:
        return err.message
    return None


def edits(before: Files, after: Files) -> Iterator[dict[str, Any]]:
    """What makes one folder of the other: files deleted, or bytes replaced in them."""
    for name in before:
        if name not in after:
            yield {"file": name, "delete": True}
        elif before[name] != after[name]:
            yield {"file": name, "splices": [*_splices(before[name], after[name])]}


def apply(bundle: Path, changes: list[Mapping[str, Any]]) -> None:
    """Change the files of a bundle."""
    for change in changes:
        path = bundle / change["file"]
        if change.get("delete"):
            path.unlink()
        else:
            path.write_bytes(_spliced(path.read_bytes(), change["splices"]))


def _files_after(before: Files, changes: list[dict[str, Any]]) -> Files:
    after = dict(before)
    for change in changes:
        if change.get("delete"):
            del after[change["file"]]
        else:
            after[change["file"]] = _spliced(before[change["file"]], change["splices"])
    return after


def _spliced(data: bytes, splices: list[list[Any]]) -> bytes:
    """Bytes with others in their place; offsets are those of what is given."""
    for offset, removed, added in reversed(splices):
        data = data[:offset] + bytes.fromhex(added) + data[offset + removed :]
    return data


def _splices(before: bytes, after: bytes) -> Iterator[list[Any]]:
    start = 0
    for old, new in zip(_parts(before), _parts(after), strict=True):
        for offset, removed, added in _replacements(old, new):
            yield [start + offset, removed, added.hex()]
        start += len(old)


def _parts(data: bytes) -> list[bytes]:
    """A safetensors file as its header, the spaces behind that, and the rest; or any file whole."""
    size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or size > len(data):
        return [data, b"", b""]
    text = len(data[: 8 + size].rstrip(b" "))
    return [data[:text], data[text : 8 + size], data[8 + size :]]


def _replacements(old: bytes, new: bytes) -> Iterator[tuple[int, int, bytes]]:
    if len(old) != len(new):
        pairs = zip(old, new, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
        end = 0
        while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
            end += 1
        yield start, len(old) - end - start, new[start : len(new) - end]
        return
    places = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    while places:
        run = [places.pop(0)]
        while places and places[0] - run[-1] <= _GAP:
            run.append(places.pop(0))
        begin, end = run[0], run[-1] + 1
        yield begin, end - begin, new[begin:end]


def _files(bundle: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(bundle.iterdir())}


def _cases() -> Iterator[tuple[str, str, Change, int | None]]:
    outside = {"an alias outside": (test_blob.metadata(row_aliases="[[1, 999]]"), "B-09")}
    for name, (change, text) in (test_blob.BROKEN | outside).items():
        rule = re.findall(r"B-\d\d", text)
        yield f"blob: {name}", (rule or ["B-12"])[0], _header(BLOB, change), None
    for name, (change, rule) in test_tied.BROKEN.items():
        yield f"tied head: {name}", rule, _header(TIED, change), None
    yield "blob: two checksums for one chunk", "B-10", _second_checksum, None
    yield "blob: a changed byte of its header", "B-11", _flip_digest(BLOB), None
    yield "tied head: a changed byte of its header", "T-06", _flip_digest(TIED), None
    yield "blob: a changed byte of a row", "B-16", _flip_row(BLOB, "rows", 5), 5
    yield "tied head: a changed byte of a row", "T-09", _flip_row(TIED, "codes", 5), 5
    yield "tied head: of another bundle", "T-11", _header(TIED, _other_digest), None
    yield "blob: of another bundle", "tables_digest", _header(BLOB, _other_source), None
    for name in (GRAPH, WEIGHTS, "tokenizer.json", MANIFEST):
        yield f"a changed byte of {name}", "checksums", _flip(name, 200), None
        yield f"{name} cut by a byte", "checksums", _cut(name), None
    yield "no checksums", "checksums", lambda bundle: (bundle / CHECKSUMS).unlink(), None
    yield (
        "checksums of another version",
        "checksums",
        _replaced(CHECKSUMS, '"version":1', '"version":2'),
        None,
    )
    for name in (MANIFEST, BLOB, GRAPH, TIED):
        yield f"no {name}", "files", lambda bundle, name=name: (bundle / name).unlink(), None
    for name, old, new in (
        ("another schema", '"schema": 2', '"schema": 3'),
        ("an unknown field", '"family":', '"families": 1, "family":'),
        ("a missing field", '"context":', '"content":'),
        ("a field of another type", '"eos_token_ids": [', '"eos_token_ids": ["1",'),
        ("no decoder", '"decoder":', '"encoder":'),
        ("an unknown backend", '"backend": "onnx"', '"backend": "onyx"'),
        ("an unknown contract", '"id": "pleexport.decoder/1"', '"id": "pleexport.decoder/9"'),
        ("a path in the list of files", f'"name": "{BLOB}"', f'"name": "../{BLOB}"'),
        ("a file of the graph that is not listed", f'"{WEIGHTS}"', '"model.onnx.more"'),
        ("a chat format with a joint twice", '"next": "system"', '"next": "user"'),
        ("no JSON", '"schema"', "'schema'"),
    ):
        yield f"manifest: {name}", "manifest", _replaced(MANIFEST, old, new), None


def _header(file: str, change: Any) -> Change:
    def apply(bundle: Path) -> None:
        before = (bundle / file).read_bytes()
        (bundle / file).write_bytes(_with_header(before, change))
        _reseal(bundle, file, before)

    return apply


def _with_header(data: bytes, change: Any) -> bytes:
    """A safetensors file with another header, written as tersely as the first one."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert _terse(header).ljust(size) == data[8 : 8 + size]
    change(header)
    with suppress(KeyError, ValueError):
        segments = json.loads(header["__metadata__"]["segments"])
        if header["__metadata__"]["segments"] == json.dumps(segments):
            header["__metadata__"]["segments"] = _terse(segments).decode()
    head = data[:8] + _terse(header).ljust(size)
    assert len(head) == 8 + size
    return head + checksum(head) + data[len(head) + 8 :]


def _terse(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _flip(file: str, offset: int) -> Change:
    def apply(bundle: Path) -> None:
        data = bytearray((bundle / file).read_bytes())
        data[offset] ^= 1
        (bundle / file).write_bytes(data)

    return apply


def _flip_digest(file: str) -> Change:
    """Another digit in the header, which is as well-formed as before."""
    return lambda bundle: _flip(file, (bundle / file).read_bytes().index(b"xxh3-128:") + 9)(bundle)


def _flip_row(file: str, tensor: str, row: int) -> Change:
    def apply(bundle: Path) -> None:
        before = (bundle / file).read_bytes()
        entry = header_of(bundle / file)[tensor]
        start, (begin, end) = 8 + int.from_bytes(before[:8], "little"), entry["data_offsets"]
        _flip(file, start + begin + row * ((end - begin) // entry["shape"][0]) + 3)(bundle)
        _reseal(bundle, file, before)

    return apply


def _cut(file: str) -> Change:
    return lambda bundle: (bundle / file).write_bytes((bundle / file).read_bytes()[:-1])


def _replaced(file: str, old: str, new: str) -> Change:
    def apply(bundle: Path) -> None:
        before = (bundle / file).read_bytes()
        assert old.encode() in before, old
        (bundle / file).write_bytes(before.replace(old.encode(), new.encode(), 1))
        if file != CHECKSUMS:
            _reseal(bundle, file, before)

    return apply


def _second_checksum(bundle: Path) -> None:
    path = bundle / BLOB
    before = path.read_bytes()

    def change(header: dict[str, Any]) -> None:
        header["checksums"]["shape"] = [2]
        header["checksums"]["data_offsets"][1] += 8

    path.write_bytes(_with_header(before + bytes(8), change))
    _reseal(bundle, BLOB, before)


def _other_digest(header: dict[str, Any]) -> None:
    found = header["__metadata__"]
    found["weights_digest"] = "xxh3-128:" + "0" * 32


def _other_source(header: dict[str, Any]) -> None:
    header["__metadata__"]["source_digest"] = "xxh3-128:" + "0" * 32


def _reseal(bundle: Path, file: str, before: bytes) -> None:
    """Let manifest and checksums say what the file is now; all else in them stays."""
    after = (bundle / file).read_bytes()
    manifest = (bundle / MANIFEST).read_bytes()
    replaced = manifest
    if file != MANIFEST:
        size = '"size": {},\n      "sha256": "{}"'.format
        old, new = (size(len(d), hashlib.sha256(d).hexdigest()) for d in (before, after))
        assert old.encode() in manifest, file
        replaced = manifest.replace(old.encode(), new.encode())
        (bundle / MANIFEST).write_bytes(replaced)
    path = bundle / CHECKSUMS
    sums = path.read_text()
    for old, new in ((before, after), (manifest, replaced)):
        sums = sums.replace(_sums(old), _sums(new))
    path.write_text(sums)


def _sums(data: bytes) -> str:
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    return json.dumps([checksum(chunk)[::-1].hex() for chunk in chunks])[1:-1].replace(", ", ",")
