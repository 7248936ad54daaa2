"""Cut a blob into shards, files of a range of its rows each: docs/blob-format.md."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pleexport.checked_header import CHECKSUM_BYTES, checked_head
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import CHECKSUM_CHUNK_BYTES, CHECKSUMS, ROWS, ChunkChecksums
from pleexport.sizes import groups


def shard_ranges(blob: Blob, most_bytes: int) -> list[range]:
    """The rows of each shard: as few as files of so many bytes allow, as even as can be.

    Args:
        most_bytes: of a file, with header and checksums. A row is never cut.
    """
    # A longer number may make the header of a shard a page longer.
    head = len(_head(blob, range(blob.num_rows))) + int(blob.metadata["page_size"])
    per_chunk = CHECKSUM_CHUNK_BYTES + CHECKSUM_BYTES
    room = max(0, most_bytes - head - CHECKSUM_BYTES) * CHECKSUM_CHUNK_BYTES // per_chunk
    count = groups(blob.num_rows, max(1, room // blob.row_stride))
    bounds = [blob.num_rows * i // count for i in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def shard_names(count: int) -> list[str]:
    """Names of the files of a blob in shards."""
    return [f"embeddings-{i}-of-{count}.safetensors" for i in range(1, count + 1)]


def write_shard(blob: Blob, rows: range, path: Path, progress: Callable[[int], object]) -> None:
    """Write some rows of a blob, each compared with its checksum.

    Args:
        progress: called with the number of bytes written since its last call.
    Raises:
        CheckFailed: a row does not match its checksum.
    """
    checksums, step = ChunkChecksums(), max(1, CHECKSUM_CHUNK_BYTES // blob.row_stride)
    with path.open("wb") as file:
        file.write(_head(blob, rows))
        for begin in range(rows.start, rows.stop, step):
            batch = blob.stored_rows(np.arange(begin, min(begin + step, rows.stop)))
            file.write(batch.data)
            checksums.update(batch)
            progress(batch.nbytes)
        file.write(checksums.finish().tobytes())


def _head(blob: Blob, rows: range) -> bytes:
    """What comes before the rows."""
    tensors = {
        ROWS: ("U8", [len(rows), blob.row_stride]),
        CHECKSUMS: ("U64", [groups(len(rows) * blob.row_stride, CHECKSUM_CHUNK_BYTES)]),
    }
    metadata = blob.metadata | {"first_row": str(rows.start)}
    return checked_head(metadata, tensors, page_size=int(blob.metadata["page_size"]))
