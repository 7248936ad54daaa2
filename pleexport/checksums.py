"""Checksums of a bundle's files, by chunk: what is read into a model is compared with them.

The form of `checksums.json` is in docs/bundle-format.md. A digest of a whole file (in the manifest)
says that a copy is complete and takes a pass of its own; a chunk is checked while it is read.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import xxhash

from pleexport.errors import BundleError, CheckFailed
from pleexport.parallel import map_in_order
from pleexport.sizes import groups
from pleexport.whole_file import read_whole

CHECKSUMS = "checksums.json"
CHUNK_BYTES = 1_048_576
_CHUNKS_AT_ONCE = 64

Checksum = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class Checksums(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`checksums.json`.

    Attributes:
        chunk_bytes: length of every chunk of a file but its last.
        files: by name, the XXH3-64 of each chunk, in order; 16 hexadecimal digits each.
    """

    format: Literal["pleexport-checksums"] = "pleexport-checksums"
    version: Literal[1] = 1
    chunk_bytes: Literal[1048576] = 1048576
    files: dict[str, list[Checksum]]


def checksums_of(data: bytes) -> list[str]:
    """The checksum of each chunk of a file's content."""
    starts = range(0, len(data), CHUNK_BYTES)
    return [xxhash.xxh3_64_hexdigest(data[i : i + CHUNK_BYTES]) for i in starts]


def sha256_and_checksums(
    path: Path, progress: Callable[[int], object] = lambda _: None
) -> tuple[str, list[str]]:
    """A file's SHA-256 in hexadecimal digits, and its checksums.

    Args:
        progress: called with the number of bytes read since its last call.
    """
    digest, checksums = hashlib.sha256(), []
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            checksums.append(xxhash.xxh3_64_hexdigest(chunk))
            progress(len(chunk))
    return digest.hexdigest(), checksums


def file_checksums(path: Path, *, first: int = 0, most: int = sys.maxsize) -> list[str]:
    """The checksum of each chunk of a file, or of the next `most` from chunk `first` on."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    found: list[str] = []
    with path.open("rb", buffering=0) as file:
        file.seek(first * CHUNK_BYTES)
        while len(found) < most and (filled := _fill(file.readinto, buffer)):
            found.append(xxhash.xxh3_64_hexdigest(buffer[:filled]))
    return found


def write_checksums(folder: Path, files: dict[str, list[str]]) -> None:
    """Write `checksums.json` for a folder."""
    encoded = msgspec.json.encode(Checksums(files=files))
    (folder / CHECKSUMS).write_bytes(encoded + b"\n")


def read_checksums(folder: Path) -> Checksums:
    """The checksums of a folder's files.

    Raises:
        BundleError: there are none, or not in the form that this version reads.
    """
    path = folder / CHECKSUMS
    try:
        return msgspec.json.decode(read_whole(path), type=Checksums)
    except OSError as err:
        raise BundleError(
            f"`{path}` cannot be read ({err.strerror}), so no file can be checked",
            hint="copy the bundle again, or rebuild it",
        ) from err
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise CheckFailed(
            f"`{path}` is damaged: {err}", hint="copy the bundle again, or rebuild it"
        ) from err


def check_bytes(data: bytes, path: Path, checksums: Checksums) -> None:
    """Compare the content of a file, which was read already.

    Raises:
        CheckFailed: names the first chunk that differs.
    """
    expected = checksums.files.get(path.name, [])
    _compare(path, checksums_of(data), expected, first=0, chunks=len(expected))


def check_files(paths: Iterable[Path], checksums: Checksums) -> None:
    """Compare files, on all cores and in little memory.

    They are read, not mapped: what is mapped counts as memory of the process.

    Raises:
        CheckFailed: names the first chunk that differs.
    """
    pieces = []
    for path in paths:
        expected = checksums.files.get(path.name, [])
        if len(expected) != groups(path.stat().st_size, CHUNK_BYTES):
            raise _damaged(path, 0, len(expected))
        starts = range(0, len(expected), _CHUNKS_AT_ONCE)
        pieces += [(path, expected, first) for first in starts]

    def check(piece: tuple[Path, list[str], int]) -> None:
        path, expected, first = piece
        found = file_checksums(path, first=first, most=_CHUNKS_AT_ONCE)
        wanted = expected[first : first + _CHUNKS_AT_ONCE]
        _compare(path, found, wanted, first=first, chunks=len(expected))

    for _ in map_in_order(check, pieces):
        pass


@contextmanager
def checked_beside(paths: Sequence[Path], checksums: Checksums | None) -> Iterator[None]:
    """Compare files while the body loads them; damage is what is said, whatever the body says.

    Args:
        checksums: None to compare nothing.
    Raises:
        CheckFailed: names the first chunk that differs.
    """
    if checksums is None:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_files, paths, checksums)
        try:
            yield
        finally:
            checked.result()


def _fill(read_into: Callable[[memoryview], int | None], buffer: memoryview) -> int:
    """Fill a buffer, or what there is of it; a read may give less than was asked for."""
    filled = 0
    while filled < len(buffer) and (count := read_into(buffer[filled:])):
        filled += count
    return filled


def _compare(path: Path, found: list[str], expected: list[str], *, first: int, chunks: int) -> None:
    """Compare the checksums of a file's chunks from `first` on, of `chunks` in all."""
    if found == expected:
        return
    pairs = zip(found, expected, strict=False)
    wrong = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    raise _damaged(path, first + wrong, chunks)


def _damaged(path: Path, chunk: int, chunks: int) -> CheckFailed:
    where = f"chunk {chunk} of {chunks}, at byte {chunk * CHUNK_BYTES:,}," if chunks else "the file"
    return CheckFailed(
        f"`{path}` is damaged: {where} does not match its checksum in `{CHECKSUMS}`",
        hint="copy the bundle again, or rebuild it",
    )
