"""Blobs hold what the checkpoint holds, and readers refuse what breaks a rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import BlobError, CheckFailed, CheckpointError, InputError
from pleexport.export.blob_writer import write_blob
from pleexport.export.segments import plan_segments
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import CHECKSUM_CHUNK_BYTES


@pytest.fixture(scope="session")
def matched(gemma4_checkpoint: Path) -> MatchedModel:
    source = Checkpoint(gemma4_checkpoint)
    return MatchedModel(families.resolve(source), source)


def write(matched: MatchedModel, path: Path, table_dtype: Any, *, page_size: int) -> None:
    segments = plan_segments(matched.model.tables, table_dtype, matched.dtype)
    write_blob(matched, path, segments=segments, page_size=page_size)


@pytest.fixture
def blob_path(matched: MatchedModel, tmp_path: Path) -> Path:
    path = tmp_path / "blob.safetensors"
    write(matched, path, "int8", page_size=16384)
    return path


@pytest.mark.parametrize("dtype", ["source", "fp32", "fp16", "bf16", "int8", "int4"])
def test_rows_come_back_in_every_dtype(dtype: str, matched: MatchedModel, tmp_path: Path) -> None:
    path = tmp_path / "blob.safetensors"
    write(matched, path, dtype, page_size=65536)
    blob = Blob(path)
    assert blob.rows_offset % 65536 == 0
    blob.verify()
    ids = np.array([0, 119, 7, 7])
    got = blob.lookup(blob.row_ids(ids))
    for table in matched.model.tables:
        source = matched.rows(table, ids).astype(np.float32) * np.float32(table.multiplier)
        expected = source.reshape(got[table.name].shape)
        largest = np.abs(expected).max()
        bound = {"fp16": 1e-3, "int8": 0.01, "int4": 0.12}.get(dtype, 0) * largest
        assert np.abs(got[table.name] - expected).max() <= bound


def test_source_rows_are_the_bytes_of_the_checkpoint(matched: MatchedModel, tmp_path: Path) -> None:
    path = tmp_path / "blob.safetensors"
    write(matched, path, "source", page_size=16384)
    rows = load_file(path)["rows"]
    for segment in Blob(path).segments:
        table = matched.model.table(segment.table)
        width, layer = segment.width, segment.layer or 0
        source = matched.rows(table, slice(None))[:, layer * width : (layer + 1) * width]
        stored = rows[:, segment.offset : segment.end]
        assert stored.tobytes() == np.ascontiguousarray(source).tobytes()


def test_ids_without_a_row_are_refused(blob_path: Path) -> None:
    with pytest.raises(InputError, match="token id 120 has no row; ids go from 0 to 119"):
        Blob(blob_path).row_ids([5, 120])


def rewrite(path: Path, change: Any) -> None:
    """Change a blob's header and keep the place of its data."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    path.write_bytes(raw[:8] + json.dumps(header).encode().ljust(size) + raw[8 + size :])


def segments(change: Any) -> Any:
    def apply(header: dict[str, Any]) -> None:
        listed = json.loads(header["__metadata__"]["segments"])
        change(listed)
        header["__metadata__"]["segments"] = json.dumps(listed)

    return apply


def metadata(**values: str | None) -> Any:
    def apply(header: dict[str, Any]) -> None:
        for name, value in values.items():
            header["__metadata__"][name] = value
            if value is None:
                del header["__metadata__"][name]

    return apply


BROKEN: dict[str, tuple[Any, str]] = {
    "rows of another dtype": (lambda h: h["rows"].update(dtype="I8"), "B-01"),
    "another format": (metadata(format="x"), "B-02"),
    "a newer version": (metadata(version="2"), "B-03"),
    "unknown metadata": (metadata(shards="3"), "B-04"),
    "missing metadata": (metadata(page_size=None), "B-05"),
    "segments that are no JSON": (metadata(segments="{"), "B-05"),
    "no segments": (metadata(segments="[]"), "B-06"),
    "an unknown segment field": (segments(lambda s: s[0].update(codebook=1)), "B-06"),
    "an unknown dtype": (segments(lambda s: s[0].update(dtype="int3")), "B-06"),
    "codes without scales": (segments(lambda s: s[0].update(scale_offset=None)), "B-06"),
    "scales of another dtype": (segments(lambda s: s[0].update(scale_dtype="fp8")), "B-06"),
    "a group of nothing": (segments(lambda s: s[0].update(group_size=-1)), "B-06"),
    "one name twice": (segments(lambda s: s[1].update(name=s[2]["name"])), "B-06"),
    "scales before their codes": (segments(lambda s: s[0].update(scale_offset=0)), "B-08"),
    "a page size that rows miss": (metadata(page_size="32769"), "B-07"),
    "a small page size": (metadata(page_size="4096"), "B-07"),
    "overlapping segments": (segments(lambda s: s[1].update(offset=0, scale_offset=8)), "B-08"),
    "a segment beyond the row": (segments(lambda s: s[-1].update(scale_offset=9999)), "B-08"),
    "a negative offset": (segments(lambda s: s[0].update(offset=-4)), "B-08"),
    "aliases that are no pairs": (metadata(row_aliases="[1]"), "B-09"),
    "an alias outside": (metadata(row_aliases="[[1, 120]]"), "B-09"),
}


def test_values_too_large_for_a_narrower_float_are_refused(
    matched: MatchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = matched.checkpoint.array
    monkeypatch.setattr(matched.checkpoint, "array", lambda name: real(name).astype("f4") * 1e6)
    with pytest.raises(CheckpointError, match="holds values that are not finite in fp16"):
        write(matched, tmp_path / "blob.safetensors", "fp16", page_size=16384)


@pytest.mark.parametrize("name", BROKEN)
def test_a_blob_that_breaks_a_rule_is_refused_by_its_number(name: str, blob_path: Path) -> None:
    Blob(blob_path)
    change, rule = BROKEN[name]
    rewrite(blob_path, change)
    with pytest.raises(BlobError) as caught:
        Blob(blob_path)
    assert rule in caught.value.message


def test_aliases_replace_ids(blob_path: Path) -> None:
    rewrite(blob_path, metadata(row_aliases="[[100, 0], [101, 0]]"))
    assert Blob(blob_path).row_ids([99, 100, 101]).tolist() == [99, 0, 0]


def test_a_flipped_bit_is_found_and_its_ids_named(blob_path: Path) -> None:
    raw = bytearray(blob_path.read_bytes())
    raw[Blob(blob_path).rows_offset + 3] ^= 4
    blob_path.write_bytes(raw)
    with pytest.raises(CheckFailed, match=r"the rows of token ids 0 to 119 do not match"):
        Blob(blob_path)


def test_rows_beyond_4_gib_and_2_31_elements_are_reached(tmp_path: Path) -> None:
    stride, num_rows = 4096, 1_300_000  # 5.3 GB, sparse on disk
    row_bytes = stride * num_rows
    chunks = -(-row_bytes // CHECKSUM_CHUNK_BYTES)
    segment = {
        "name": "t", "table": "t", "layer": None, "offset": 0, "width": 1024,
        "dtype": "fp32", "multiplier": 2.0,
    }  # fmt: skip
    header = {
        "__metadata__": {
            "format": "pleexport-blob",
            "version": "1",
            "page_size": "16384",
            "row_aliases": "[]",
            "segments": json.dumps([segment]),
            "source_digest": "",
        },
        "rows": {"dtype": "U8", "shape": [num_rows, stride], "data_offsets": [0, row_bytes]},
        "checksums": {
            "dtype": "U64",
            "shape": [chunks],
            "data_offsets": [row_bytes, row_bytes + 8 * chunks],
        },
    }
    last = np.arange(1024, dtype=np.float32)
    tail = bytes(row_bytes - (chunks - 1) * CHECKSUM_CHUNK_BYTES - stride) + last.tobytes()
    zeros = xxhash.xxh3_64_intdigest(bytes(CHECKSUM_CHUNK_BYTES))
    sums = np.full(chunks, zeros, dtype="<u8")
    sums[-1] = xxhash.xxh3_64_intdigest(tail)
    raw = json.dumps(header).encode().ljust(16384 - 8)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.seek(16384 + row_bytes - stride)
        file.write(last.tobytes() + sums.tobytes())
    blob = Blob(path)
    ids = blob.row_ids([num_rows - 1, 0])
    blob.prefetch(ids)
    np.testing.assert_array_equal(blob.lookup(ids)["t"], [last * 2, last * 0])
    assert blob.pages(ids) == 2
