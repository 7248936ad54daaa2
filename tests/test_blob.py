"""Blobs hold what the checkpoint holds, and readers refuse what breaks a rule."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import write_raw
from blob_sources import PAGE_SIZE, VECTOR_SOURCES, phone_source
from blob_sources import write as write_made
from resealed import CHUNK, change_header, change_rows, checksum
from safetensors.numpy import load_file

from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import BlobError, CheckFailed, CheckpointError, InputError
from pleexport.export import blob_writer
from pleexport.export.blob_writer import blob_bytes, write_blob
from pleexport.export.segments import plan_segments
from pleexport.export.shards import shard_ranges, write_shard
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


def segments(change: Any) -> Any:
    def apply(header: dict[str, Any]) -> None:
        listed = json.loads(header["__metadata__"]["segments"])
        change(listed)
        header["__metadata__"]["segments"] = json.dumps(listed)

    return apply


def test_what_float32_cannot_hold_is_infinite(blob_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(blob_path, tmp_path / "beyond.safetensors"))
    change_rows(path, lambda rows: rows[7, :64].fill(0x7B))
    change_header(path, segments(lambda listed: listed[0].update(multiplier=3e38)))
    table = Blob(path).segments[0].table
    vectors = Blob(path).lookup(np.arange(120))[table]  # warnings are errors in tests
    assert np.isinf(vectors[7]).any()
    assert np.isfinite(vectors[8]).all()


def metadata(**values: str | None) -> Any:
    def apply(header: dict[str, Any]) -> None:
        for name, value in values.items():
            header["__metadata__"][name] = value
            if value is None:
                del header["__metadata__"][name]

    return apply


def cut_rows(header: dict[str, Any]) -> None:
    num_rows, stride = header["rows"]["shape"]
    header["rows"]["shape"] = [64 * num_rows, stride // 64]
    header["__metadata__"]["num_rows_total"] = str(64 * num_rows)


BROKEN: dict[str, tuple[Any, str]] = {
    "rows of another dtype": (lambda h: h["rows"].update(dtype="I8"), "B-01"),
    "rows of three dimensions": (lambda h: h["rows"]["shape"].append(1), "B-01"),
    "no rows": (lambda h: h.update(row=h.pop("rows")), "B-04"),
    "rows of no multiple of 64": (cut_rows, "B-01"),
    "a header checksum of another shape": (
        lambda h: h["header_checksum"].update(shape=[1, 1]),
        "B-01",
    ),
    "a header checksum of another dtype": (
        lambda h: h["header_checksum"].update(dtype="I64"),
        "B-01",
    ),
    "checksums of another dtype": (lambda h: h["checksums"].update(dtype="I64"), "B-01"),
    "another format": (metadata(format="x"), "B-02"),
    "no format": (metadata(format=None), "B-02"),
    "a newer version": (metadata(version="3"), "B-03"),
    "no version": (metadata(version=None), "B-03"),
    "unknown metadata": (metadata(shards="3"), "B-04"),
    "missing metadata": (metadata(page_size=None), "B-05"),
    "segments that are no JSON": (metadata(segments="{"), "B-05"),
    "segments with a key twice": (
        lambda h: metadata(segments=h["__metadata__"]["segments"].replace("{", '{"width":1,', 1))(
            h
        ),
        "B-05",
    ),
    "a page size that is no integer": (metadata(page_size="16384.5"), "B-05"),
    "a first row that is no number": (metadata(first_row="true"), "B-05"),
    "fewer than no rows": (metadata(num_rows_total="-1"), "B-05"),
    "no segments": (metadata(segments="[]"), "B-06"),
    "an unknown segment field": (segments(lambda s: s[0].update(codebook=1)), "B-06"),
    "a missing segment field": (segments(lambda s: s[0].pop("scale_dtype")), "B-06"),
    "an unknown dtype": (segments(lambda s: s[0].update(dtype="int3")), "B-06"),
    "codes without scales": (segments(lambda s: s[0].update(scale_offset=None)), "B-06"),
    "scales without codes": (segments(lambda s: s[0].update(dtype="bf16")), "B-06"),
    "scales of another dtype": (segments(lambda s: s[0].update(scale_dtype="bf16")), "B-06"),
    "a group of nothing": (segments(lambda s: s[0].update(group_size=0)), "B-06"),
    "a group wider than the segment": (segments(lambda s: s[0].update(group_size=999)), "B-06"),
    "a width of nothing": (segments(lambda s: s[0].update(width=0)), "B-06"),
    "a layer below 0": (segments(lambda s: s[0].update(layer=-1)), "B-06"),
    "a multiplier that is no number": (
        segments(lambda s: s[0].update(multiplier=float("nan"))),
        "B-06",
    ),
    "a multiplier beyond binary32": (segments(lambda s: s[0].update(multiplier=1e39)), "B-06"),
    "one name twice": (segments(lambda s: s[1].update(name=s[2]["name"])), "B-06"),
    "a negative offset": (segments(lambda s: s[0].update(offset=-4)), "B-06"),
    "a page size that rows miss": (metadata(page_size="32769"), "B-07"),
    "a small page size": (metadata(page_size="4096"), "B-07"),
    "scales before their codes": (segments(lambda s: s[0].update(scale_offset=0)), "B-08"),
    "overlapping segments": (segments(lambda s: s[1].update(offset=0, scale_offset=8)), "B-08"),
    "a segment beyond the row": (segments(lambda s: s[-1].update(scale_offset=9998)), "B-08"),
    "an unaligned segment": (
        segments(lambda s: [t.update(offset=t["offset"] + 2) for t in s]),
        "B-08",
    ),
    "unaligned scales": (
        segments(lambda s: [t.update(scale_offset=t["scale_offset"] + 1) for t in s]),
        "B-08",
    ),
    "scales that are larger than their alignment": (
        segments(lambda s: s[0].update(scale_dtype="fp32", scale_offset=s[0]["scale_offset"] + 2)),
        "B-08",
    ),
    "layers in another order": (
        segments(lambda s: (s[1].update(layer=1), s[2].update(layer=0))),
        "B-08",
    ),
    "layers of different multipliers": (segments(lambda s: s[2].update(multiplier=3)), "B-08"),
    "aliases that are no pairs": (metadata(row_aliases="[1]"), "B-09"),
    "an alias outside": (metadata(row_aliases="[[1, 120]]"), "B-09"),
    "an alias of a negative id": (metadata(row_aliases="[[-1, 0]]"), "B-09"),
    "two aliases of one id": (metadata(row_aliases="[[1, 0], [1, 2]]"), "B-09"),
    "an alias of an alias": (metadata(row_aliases="[[1, 0], [2, 1]]"), "B-09"),
    "more rows than there are": (metadata(first_row="1"), "B-12"),
    "a shard": (metadata(num_rows_total="500"), "is a shard, rows 0 to 119 of 500"),
    "another shard": (
        metadata(first_row="380", num_rows_total="500"),
        "is a shard, rows 380 to 499 of 500; this reader takes whole blobs (B-12)",
    ),
}


def test_values_too_large_for_a_narrower_float_are_refused(
    matched: MatchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = matched.checkpoint.array
    monkeypatch.setattr(matched.checkpoint, "array", lambda name: real(name).astype("f4") * 1e6)
    with pytest.raises(CheckpointError, match="holds values that are not finite in fp16"):
        write(matched, tmp_path / "blob.safetensors", "fp16", page_size=16384)


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_a_quantized_table_is_widened_where_another_dtype_is_asked_for(
    dtype: str, tmp_path: Path
) -> None:
    made = phone_source()
    write_made(made, tmp_path / "blob", dtype)
    blob = Blob(tmp_path / "blob")
    assert {segment.dtype for segment in blob.segments} == {dtype}
    found = blob.lookup(np.arange(blob.num_rows))
    for table in made.model.tables:
        expected = made.vectors(table.name) * np.float32(table.multiplier)
        bound = {"fp32": 0, "int8": 0.01, "int4": 0.12}[dtype] * np.abs(expected).max()
        got = found[table.name].reshape(expected.shape)
        assert np.abs(got - expected).max() <= bound


def test_scales_of_a_checkpoint_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    made = phone_source()
    made.tensors["per_layer"].scales[2, 1] = np.nan
    with pytest.raises(CheckpointError, match="table `per_layer` has scales that are not finite"):
        write_made(made, tmp_path / "blob", "source")


def test_the_digest_of_a_quantized_source_sees_codes_and_scales(tmp_path: Path) -> None:
    def digest(change: Any) -> str:
        made = phone_source()
        change(made.tensors["per_layer"])
        write_made(made, tmp_path / "blob", "int8")
        return Blob(tmp_path / "blob").source_digest

    def flip_code(rows: Any) -> None:
        rows.codes[0, 0, 0] ^= 1

    def turn_scale(rows: Any) -> None:
        rows.scales[0, 0, 0] *= -1

    assert len({digest(change) for change in (lambda rows: None, flip_code, turn_scale)}) == 3


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_sizes_are_known_before_and_batches_leave_no_trace(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, dtype = VECTOR_SOURCES[name]
    made, (whole, batched) = make(), (tmp_path / "whole", tmp_path / "batched")
    write_made(made, whole, dtype)
    segments = plan_segments(made.model.tables, dtype, made.dtype)
    assert whole.stat().st_size == blob_bytes(made.model, segments, PAGE_SIZE)
    monkeypatch.setattr(blob_writer, "_BATCH_BYTES", 2 * Blob(whole).row_stride)
    write_made(made, batched, dtype)
    assert whole.read_bytes() == batched.read_bytes()


@pytest.mark.parametrize("name", BROKEN)
def test_a_blob_that_breaks_a_rule_is_refused_by_its_number(name: str, blob_path: Path) -> None:
    change_header(blob_path, lambda header: None)
    Blob(blob_path).verify()
    change, told = BROKEN[name]
    change_header(blob_path, change)
    with pytest.raises(BlobError) as caught:
        Blob(blob_path)
    assert told in caught.value.message


def test_every_rule_for_files_is_broken_by_a_test() -> None:
    page = (Path(__file__).parents[1] / "docs" / "blob-format.md").read_text(encoding="utf-8")
    section = page[page.index("A reader must refuse a file") : page.index("And when it reads:")]
    rules = set(re.findall(r"^- \*\*(B-\d\d)\*\*", section, re.MULTILINE))
    assert rules
    broken = {rule for _, told in BROKEN.values() for rule in re.findall(r"B-\d\d", told)}
    assert rules == broken | {"B-10", "B-11"}  # which have tests of their own


def test_tensors_in_another_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    head = raw_header(num_rows=1, stride=64, order=("rows", "header_checksum", "checksums"))
    row = bytes(56) + checksum(bytes(56))
    path.write_bytes(head + row + checksum(head) + checksum(row))
    with pytest.raises(BlobError, match=r"does not begin with one `header_checksum`.*B-01"):
        Blob(path)


@pytest.mark.parametrize("chunks", [0, 2])
def test_each_chunk_has_one_checksum(chunks: int, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    write_zeros(path, num_rows=2)
    Blob(path).verify()
    write_zeros(path, num_rows=2, chunks=chunks)
    with pytest.raises(BlobError, match=r"has \d checksums, not one for each chunk \(B-10\)"):
        Blob(path)


@pytest.mark.parametrize("version", ["2", "3"])
def test_a_damaged_header_is_not_taken_for_a_newer_one(version: str, blob_path: Path) -> None:
    raw = blob_path.read_bytes()
    changed = raw.replace(b'"version":"2"', f'"version":"{version}"'.encode(), 1)
    changed = changed.replace(b'"source_digest":"xxh3', b'"source_digest":"xxh4', 1)
    blob_path.write_bytes(changed)
    with pytest.raises(CheckFailed, match=r"its header does not match its checksum \(B-11\)"):
        Blob(blob_path)


def test_a_blob_of_version_1_is_refused_with_what_to_do(tmp_path: Path) -> None:
    header = {
        "__metadata__": {
            "format": "pleexport-blob", "version": "1", "page_size": "16384", "row_aliases": "[]",
            "segments": "[]", "source_digest": "",
        },
        "rows": {"dtype": "U8", "shape": [1, 64], "data_offsets": [0, 64]},
        "checksums": {"dtype": "U64", "shape": [1], "data_offsets": [64, 72]},
    }  # fmt: skip
    path = write_raw(tmp_path / "blob", header, bytes(72), pad_to=16384)
    with pytest.raises(BlobError, match="has blob version '1'; this reader knows 2") as caught:
        Blob(path)
    assert caught.value.hint == "build the bundle again from its checkpoint"


def test_aliases_replace_ids(blob_path: Path) -> None:
    change_header(blob_path, metadata(row_aliases="[[100, 0], [101, 0]]"))
    assert Blob(blob_path).row_ids([99, 100, 101]).tolist() == [99, 0, 0]


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


def test_a_damaged_row_is_found_by_its_lookup(blob_path: Path) -> None:
    blob = Blob(blob_path)
    flip(blob_path, blob.rows_offset + 7 * blob.row_stride + 3)
    damaged = Blob(blob_path)
    for tables in (None, ["embed_tokens"], ["embed_tokens_per_layer"]):
        damaged.lookup(np.array([6, 8]), tables)
        with pytest.raises(CheckFailed, match=r"the row of token id 7 does not match.*\(B-16\)"):
            damaged.lookup(np.array([6, 7, 8]), tables)
    with pytest.raises(CheckFailed, match="the row of token id 7 does not match"):
        damaged.verify()


def test_an_alias_is_not_damaged_where_its_own_row_is(blob_path: Path) -> None:
    change_header(blob_path, metadata(row_aliases="[[7, 3]]"))
    blob = Blob(blob_path)
    flip(blob_path, blob.rows_offset + 7 * blob.row_stride)
    blob.lookup(blob.row_ids([7]))
    flip(blob_path, blob.rows_offset + 3 * blob.row_stride)
    with pytest.raises(CheckFailed, match="the row of token id 3"):
        blob.lookup(blob.row_ids([7]))


def test_rows_in_wrong_places_are_found_by_verification(blob_path: Path) -> None:
    blob = Blob(blob_path)
    raw, begin, stride = bytearray(blob_path.read_bytes()), blob.rows_offset, blob.row_stride
    raw[begin : begin + stride], raw[begin + stride : begin + 2 * stride] = (
        raw[begin + stride : begin + 2 * stride],
        raw[begin : begin + stride],
    )
    blob_path.write_bytes(raw)
    swapped = Blob(blob_path)
    swapped.lookup(np.array([0, 1]))
    with pytest.raises(CheckFailed, match=r"token ids 0 to 119 lie in other places.*\(B-19\)"):
        swapped.verify()


def test_a_row_on_the_seam_of_two_chunks_is_checked(tmp_path: Path) -> None:
    path, stride = tmp_path / "blob", 3 * 64
    num_rows = 2 * CHECKSUM_CHUNK_BYTES // stride + 2
    write_zeros(path, num_rows=num_rows, stride=stride, chunks=3)
    blob = Blob(path)
    blob.verify()
    seam = CHECKSUM_CHUNK_BYTES // stride
    for position in (seam * stride + 1, (seam + 1) * stride - 9, num_rows * stride - 1):
        flip(path, blob.rows_offset + position)
        with pytest.raises(CheckFailed, match=f"the row of token id {position // stride} does"):
            blob.verify()
        flip(path, blob.rows_offset + position)
    blob.verify()


def test_padding_means_nothing(blob_path: Path) -> None:
    blob, ids = Blob(blob_path), np.arange(120)
    before, used = blob.lookup(ids), np.zeros(blob.row_stride, dtype=bool)
    for segment in blob.segments:
        used[segment.offset : segment.end] = True
    assert not used.all()
    change_rows(blob_path, lambda rows: rows.__setitem__((slice(None), ~used), 0xA5))
    changed = Blob(blob_path)
    changed.verify()
    for name, vectors in changed.lookup(ids).items():
        np.testing.assert_array_equal(vectors, before[name])


def raw_header(
    *, num_rows: int, stride: int, width: int = 4, chunks: int | None = None, order: Any = None
) -> bytes:
    """The header of a blob with a table `t` of float32 rows, up to its checksum."""
    segment = {
        "name": "t", "table": "t", "layer": None, "offset": 0, "width": width, "dtype": "fp32",
        "group_size": None, "scale_dtype": None, "scale_offset": None, "multiplier": 2.0,
    }  # fmt: skip
    row_bytes = num_rows * stride
    chunks = -(-row_bytes // CHECKSUM_CHUNK_BYTES) if chunks is None else chunks
    tensors = {
        "header_checksum": ("U64", [1], 8),
        "rows": ("U8", [num_rows, stride], row_bytes),
        "checksums": ("U64", [chunks], 8 * chunks),
    }
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pleexport-blob", "version": "2", "page_size": "16384", "first_row": "0",
            "num_rows_total": str(num_rows), "row_aliases": "[]",
            "segments": json.dumps([segment]), "source_digest": "",
        }
    }  # fmt: skip
    position = 0
    for name in order or tensors:
        dtype, shape, nbytes = tensors[name]
        offsets = [position, position + nbytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += nbytes
    raw = json.dumps(header).encode().ljust(16384 - 16)
    return len(raw).to_bytes(8, "little") + raw


def write_zeros(path: Path, *, num_rows: int, stride: int = 64, chunks: int = 1) -> None:
    """A blob of rows of zeros."""
    head = raw_header(num_rows=num_rows, stride=stride, chunks=chunks)
    rows = (bytes(stride - 8) + checksum(bytes(stride - 8))) * num_rows
    sums = [checksum(rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)]
    path.write_bytes(head + checksum(head) + rows + b"".join([*sums, bytes(8)][:chunks]))


def test_rows_beyond_4_gib_and_2_31_elements_are_reached(tmp_path: Path) -> None:
    stride, num_rows = 4160, 1_300_000  # 5.4 GB, sparse on disk
    head = raw_header(num_rows=num_rows, stride=stride, width=1024)
    last = np.arange(1024, dtype=np.float32)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(head + checksum(head))
        for row, values in ((0, last * 0), (num_rows - 1, last)):
            body = values.tobytes().ljust(stride - 8, b"\0")
            file.seek(16384 + row * stride)
            file.write(body + checksum(body))
        file.truncate(16384 + num_rows * stride + 8 * -(-num_rows * stride // CHUNK))
    blob = Blob(path)
    ids = blob.row_ids([num_rows - 1, 0])
    blob.prefetch(ids)
    np.testing.assert_array_equal(blob.lookup(ids)["t"], [last * 2, last * 0])
    assert blob.pages(ids) == 4


def cut(path: Path, folder: Path, *bounds: int) -> list[Path]:
    """Shards of a blob that end at these rows."""
    blob, paths = Blob(path), []
    for begin, end in itertools.pairwise([0, *bounds]):
        paths.append(folder / f"rows-{begin}.safetensors")
        write_shard(blob, range(begin, end), paths[-1], lambda _: None)
    return paths


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_shards_give_what_the_whole_blob_gives(name: str, tmp_path: Path) -> None:
    make, dtype = VECTOR_SOURCES[name]
    whole_path = tmp_path / "whole"
    write_made(make(), whole_path, dtype)
    whole = Blob(whole_path)
    n = whole.num_rows
    paths = cut(whole_path, tmp_path, 1, n - 1, n)
    blob = Blob(paths[::-1])  # in any order
    blob.verify()
    ids = blob.row_ids([n - 1, 0, *range(n), 0])
    blob.prefetch(ids)
    expected = whole.lookup(ids)
    for table, vectors in blob.lookup(ids).items():
        assert vectors.tobytes() == expected[table].tobytes()
    assert (blob.num_rows, blob.shapes) == (n, whole.shapes)
    assert blob.row_aliases == whole.row_aliases
    assert blob.pages(ids) >= 2
    assert blob.path == paths[0]
    # Written again of the shards, in one piece, it is the file that it was.
    write_shard(blob, range(n), tmp_path / "joined", lambda _: None)
    assert (tmp_path / "joined").read_bytes() == whole_path.read_bytes()


def test_a_damaged_row_of_a_shard_names_file_and_token_id(blob_path: Path, tmp_path: Path) -> None:
    paths = cut(blob_path, tmp_path, 50, 120)
    blob = Blob(paths)
    flip(paths[1], blob.rows_offset + 7 * blob.row_stride + 3)
    damaged = Blob(paths)
    damaged.lookup(np.array([7, 56, 58]))
    for check in (lambda: damaged.lookup(np.array([3, 57])), damaged.verify):
        with pytest.raises(CheckFailed) as caught:
            check()
        assert caught.value.message == (
            f"`{paths[1]}` is damaged: the row of token id 57 does not match its checksum (B-16)"
        )


def test_files_that_are_not_the_shards_of_one_blob_are_refused(
    blob_path: Path, tmp_path: Path
) -> None:
    first, second, third = cut(blob_path, tmp_path, 40, 80, 120)

    def refusal(*paths: Path) -> str:
        with pytest.raises(BlobError) as caught:
            Blob(paths)
        return caught.value.message

    Blob([first, second, third])
    assert refusal(first, third) == (
        f"`{third}` begins at row 80, and the shards before it end at 40 (B-12)"
    )
    assert refusal(second, third) == (
        f"`{second}` begins at row 40, and the shards before it end at 0 (B-12)"
    )
    again = Path(shutil.copy(second, tmp_path / "again"))
    assert refusal(first, second, again, third) == (
        f"`{again}` begins at row 40, and the shards before it end at 80 (B-12)"
    )
    assert refusal(first, second) == (
        f"`{second}` is the last shard and ends at row 80 of 120 (B-12)"
    )
    assert refusal(second) == (
        f"`{second}`: is a shard, rows 40 to 79 of 120; this reader takes whole blobs (B-12)"
    )
    change_header(second, metadata(source_digest="other"))
    assert refusal(first, second, third) == (
        f"`{second}` is no shard of the blob of `{first}`: they disagree about `source_digest` "
        "(B-12)"
    )
    other = cut(blob_path, tmp_path, 40, 80, 120)
    change_header(other[2], metadata(num_rows_total="121"))
    assert "they disagree about `num_rows_total` (B-12)" in refusal(*other)


def test_shards_are_few_and_even_and_no_file_is_larger(blob_path: Path, tmp_path: Path) -> None:
    blob = Blob(blob_path)
    whole = blob_path.stat().st_size
    assert shard_ranges(blob, whole + 16384 + 64) == [range(120)]
    for most in (whole - 1, 40_000, 16384 * 2 + 2 * blob.row_stride + 100):
        ranges = shard_ranges(blob, most)
        assert [r.start for r in ranges[1:]] == [r.stop for r in ranges[:-1]]
        assert (ranges[0].start, ranges[-1].stop) == (0, 120)
        lengths = [*map(len, ranges)]
        assert max(lengths) - min(lengths) <= 1 < len(lengths)
        write_shard(blob, max(ranges, key=len), tmp_path / "shard", lambda _: None)
        assert (tmp_path / "shard").stat().st_size <= most
