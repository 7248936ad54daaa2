"""The head of a safetensors file whose first tensor is the checksum of all that comes before it.

The next tensor begins on a page: spaces behind the header's JSON see to that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import xxhash

from pleexport.dtypes import BY_SAFETENSORS
from pleexport.safetensors_file import SafetensorsFile
from pleexport.sizes import align

HEADER_CHECKSUM = "header_checksum"
CHECKSUM_BYTES = 8


def checked_head(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, list[int]]],
    *,
    page_size: int,
) -> bytes:
    """All bytes before the first of `tensors`, which begins at a multiple of the page size.

    Args:
        tensors: by name, dtype as safetensors calls it and shape; in the order of the file.
    Source: docs/blob-format.md.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in {HEADER_CHECKSUM: ("U64", [1]), **tensors}.items():
        end = position + math.prod(shape) * BY_SAFETENSORS[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    length = align(8 + len(raw) + CHECKSUM_BYTES, page_size) - CHECKSUM_BYTES - 8
    checked = length.to_bytes(8, "little") + raw.ljust(length)
    return checked + xxhash.xxh3_64_intdigest(checked).to_bytes(CHECKSUM_BYTES, "little")


def header_is_damaged(file: SafetensorsFile) -> bool:
    """Whether a file has such a checksum, and a header that it is not the checksum of."""
    entry = file.entries.get(HEADER_CHECKSUM)
    if entry is None or (entry.dtype, entry.shape) != ("uint64", (1,)):
        return False
    found = xxhash.xxh3_64_intdigest(file.mapping[: file.data_offset])
    return found != int(file.array(HEADER_CHECKSUM)[0])
