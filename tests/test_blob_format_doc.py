"""docs/blob-format.md tells the truth: its hexdump, its decoder, and the test vectors.

Run as a script, this file writes the vectors and the generated parts of the document anew.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from blob_sources import (
    TIED_SOURCES,
    VECTOR_SOURCES,
    TiedSource,
    example,
    table,
    tied_example,
    write,
    write_tied,
)
from numpy.typing import NDArray

from pleexport.codes import unpack_codes
from pleexport.dtypes import CODED, bits
from pleexport.export.segments import plan_segments, row_stride
from pleexport.model import Codes
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import Segment
from pleexport.runtime.tied import TiedRows
from pleexport.tied_layout import TiedLayout

DOCUMENT = Path(__file__).parents[1] / "docs" / "blob-format.md"
VECTORS = Path(__file__).with_name("vectors")
LARGEST_VECTOR = 32 * 1024
Decoder = Callable[[list[Path], int], dict[str, NDArray[np.float32]]]
# XXH3-64 of inputs of these lengths, whose byte i is 131 i + 17: around the lengths at which the
# algorithm changes, and those of rows, headers and chunks.
HASHES = VECTORS / "xxh3-64.json"
HASHED_LENGTHS = (
    *(0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 32, 33, 56, 64, 65, 96, 97, 120, 128, 129, 160, 184),
    *(239, 240, 241, 255, 256, 257, 512, 1023, 1024, 1025, 1032, 2040, 5944, 10_680, 16_376),
    *(65_536, 1_048_576),
)


def hashed_bytes(length: int) -> bytes:
    return ((np.arange(length) * 131 + 17) % 256).astype(np.uint8).tobytes()


def render_header(path: Path) -> str:
    """The JSON header, with the JSON inside its strings laid open."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    lines = ["{", '  "__metadata__": {']
    for name, text in header["__metadata__"].items():
        if name != "segments":
            lines.append(f"    {json.dumps(name)}: {json.dumps(text)},")
            continue
        segments = [json.dumps(segment, separators=(",", ":")) for segment in json.loads(text)]
        lines += ['    "segments": "[', *(f"      {s}," for s in segments)]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append('    ]",')
    lines[-1] = lines[-1].removesuffix(",")
    lines.append("  },")
    for name in (name for name in header if name != "__metadata__"):
        lines.append(f"  {json.dumps(name)}: {json.dumps(header[name])},")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([*lines, "}"])


def render_hexdump(path: Path) -> str:
    """Every byte of a small blob, one line for each field."""
    data, blob = path.read_bytes(), Blob(path)
    length = int.from_bytes(data[:8], "little")
    json_end = data.rindex(b"}", 0, 8 + length) + 1
    lines = [
        _line(data, 0, 8, f"header length: {length}"),
        _line(data, 8, json_end, "header: JSON"),
        _line(data, json_end, 8 + length, "header: spaces up to the checksum"),
        _line(data, 8 + length, blob.rows_offset, "xxh3-64 of the header"),
    ]
    for row in range(blob.num_rows):
        lines.append("")
        begin = blob.rows_offset + row * blob.row_stride
        position = begin
        for segment in blob.segments:
            for first, end, text in _fields(blob, segment, row):
                lines.append(_gap(data, position, begin + first))
                lines.append(_line(data, begin + first, begin + end, text))
                position = begin + end
        end = begin + blob.row_stride
        lines.append(_gap(data, position, end - 8))
        lines.append(_line(data, end - 8, end, f"xxh3-64 of row {row}"))
    lines.append("")
    for chunk, at in enumerate(
        range(blob.rows_offset + blob.num_rows * blob.row_stride, len(data), 8)
    ):
        lines.append(_line(data, at, at + 8, f"xxh3-64 of chunk {chunk}"))
    lines.append(f"{len(data):08x}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line != _NOTHING))


_NOTHING = "nothing"
_BYTES_SHOWN = 8


def _line(data: bytes, begin: int, end: int, text: str) -> str:
    shown = data[begin:end].hex(" ")
    if end - begin > _BYTES_SHOWN:
        shown = f"{data[begin : begin + 4].hex(' ')} .. {data[end - 2 : end].hex(' ')}"
    return f"{begin:08x}  {shown:<24} {end - begin:>5}  {text}"


def _gap(data: bytes, begin: int, end: int) -> str:
    return _line(data, begin, end, "padding") if end > begin else _NOTHING


def _fields(blob: Blob, segment: Segment, row: int) -> Iterator[tuple[int, int, str]]:
    raw, wide = blob.stored_rows(np.arange(blob.num_rows))[row], bits(segment.dtype)
    codes_end = segment.offset + segment.code_bytes
    codes = unpack_codes(raw[segment.offset : codes_end], bits=wide, width=segment.width)
    listed = " ".join(map(str, codes.tolist()))
    pad = ", pad" if segment.width * wide % 8 else ""
    yield segment.offset, codes_end, f"row {row}, {segment.name}: codes {listed}{pad}"
    scales = ", ".join(str(float(scale)) for scale in _scales(blob, segment, row))
    assert segment.scale_offset is not None
    yield segment.scale_offset, segment.end, f"scales {scales}"


def _scales(blob: Blob, segment: Segment, rows: int | slice) -> NDArray[Any]:
    assert segment.scale_offset is not None
    assert segment.scale_dtype is not None
    dtype = {"fp16": "<f2", "fp32": "<f4"}[segment.scale_dtype]
    raw = blob.stored_rows(np.arange(blob.num_rows))[rows][..., segment.scale_offset : segment.end]
    return np.ascontiguousarray(raw).view(dtype)


def render_element(path: Path) -> str:
    """How the first element of the example comes about."""
    blob = Blob(path)
    segment, byte = blob.segments[0], int(blob.stored_rows(np.arange(blob.num_rows))[0, 0])
    code, scale = byte % 4 - 2, float(_scales(blob, segment, 0)[0])
    value = np.float32(code) * np.float32(scale)
    vector = value * np.float32(segment.multiplier)
    assert vector == blob.lookup(np.array([0]))[segment.table][0, 0]
    text = (
        f"Token id 0, `{segment.table}`, element 0: byte `{byte:02x}`, lowest two bits {byte % 4}, "
        f"code {byte % 4} - 2 = {code}; value {code} * {scale} = {float(value)}; "
        f"vector {float(value)} * {segment.multiplier} = {float(vector)}."
    )
    return textwrap.fill(text, 100)


def render_tied_hexdump(path: Path, layout: TiedLayout) -> str:
    """Every byte of a small file of a tied head."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    json_end = data.rindex(b"}", 0, 8 + length) + 1
    lines = [
        _line(data, 0, 8, f"header length: {length}"),
        _line(data, 8, json_end, "header: JSON"),
        _line(data, json_end, 8 + length, "header: spaces up to the checksum"),
        _line(data, 8 + length, layout.codes_offset, "xxh3-64 of the header"),
        "",
    ]
    for row in range(layout.rows):
        begin = layout.codes_offset + row * layout.code_bytes
        raw = np.frombuffer(data[begin : begin + layout.code_bytes], np.uint8)
        codes = unpack_codes(raw, bits=bits(layout.dtype), width=layout.width).tolist()
        text = f"row {row}: codes {' '.join(map(str, codes))}, pad"
        lines.append(_line(data, begin, begin + layout.code_bytes, text))
    for row in range(layout.rows):
        begin = layout.scales_offset + row * 4 * layout.num_groups
        end = begin + 4 * layout.num_groups
        scales = np.frombuffer(data[begin:end], "<f4")
        listed = ", ".join(str(float(scale)) for scale in scales)
        lines.append(_line(data, begin, end, f"row {row}: scales {listed}"))
    for row in range(layout.rows):
        begin = layout.checksums_offset + 8 * row
        lines.append(_line(data, begin, begin + 8, f"row {row}: xxh3-64 of codes, scales, {row}"))
    return "\n".join([*lines, f"{len(data):08x}"])


def render_tied_element(made: TiedSource) -> str:
    """How the first element of the example comes about."""
    byte, scale, layout = int(made.codes[0, 0]), made.scales[0, 0], made.layout
    code = byte % 16 - 8
    value = np.float32(code) * scale
    vector = value * np.float32(layout.multiplier)
    assert vector == made.vectors[0, 0]
    text = (
        f"Row 0, element 0: byte `{byte:02x}`, lowest four bits {byte % 16}, "
        f"code {byte % 16} - 8 = {code}; value {code} * {float(scale)} = {float(value)}; "
        f"vector {float(value)} * {layout.multiplier} = {float(vector)}."
    )
    return textwrap.fill(text, 100)


def code_blocks(language: str) -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)


def documents_decoder() -> Decoder:
    """The decoder that the document prints."""
    return documents_functions()["decode"]


def documents_functions() -> dict[str, Any]:
    """What the document's code defines."""
    namespace: dict[str, Any] = {}
    for block in code_blocks("python"):
        assert "pleexport" not in re.sub(r'"pleexport-(blob|tied)"', "", block)
        exec(compile(block, str(DOCUMENT), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def decode() -> Decoder:
    return documents_decoder()


def expected_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_document_shows_the_example(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    write(example(), path, "source")
    made = tied_example()
    write_tied(made, tied := tmp_path / "tied")
    assert code_blocks("text") == [
        render_header(path),
        render_hexdump(path),
        render_header(tied),
        render_tied_hexdump(tied, made.layout),
    ]
    for element in (render_element(path), render_tied_element(made)):
        assert f"\n\n{element}\n\n" in DOCUMENT.read_text(encoding="utf-8")


def test_document_states_the_sizes_of_rows() -> None:
    def stride(dtype: Any, *codes: Codes | None) -> str:
        main, layers = codes or (None, None)
        tables = (
            table("main", width=1536, layers=None, multiplier=1, rows=1, codes=main),
            table("layers", width=256, layers=35, multiplier=1, rows=1, codes=layers),
        )
        return f"{row_stride(plan_segments(tables, dtype, 'bf16')):,}"

    phone = stride("source", Codes("int2", 1536, "fp32"), Codes("int4", 256, "fp32"))
    stated = (
        f"A row of Gemma 4 E2B has {stride('source')} bytes in bf16, {stride('int8')} in int8, "
        f"{stride('int4')} in int4, and {phone} with the codes"
    )
    assert stated in " ".join(DOCUMENT.read_text(encoding="utf-8").split())


def test_vectors_hold_all_that_can_be_told_apart() -> None:
    """Every dtype, every code of 2 and 4 bits, -128, both kinds of scales, and bytes filled up."""
    codes: dict[str, set[int]] = {dtype: set() for dtype in CODED}
    kinds, padded = set(), set()
    for path in VECTORS.glob("*.safetensors"):
        blob = Blob(path)
        for segment in blob.segments:
            kinds.add((segment.dtype, segment.scale_dtype))
            if segment.dtype not in CODED:
                continue
            wide = bits(segment.dtype)
            raw = blob.stored_rows(np.arange(blob.num_rows))[
                :, segment.offset : segment.offset + segment.code_bytes
            ]
            found = unpack_codes(np.ascontiguousarray(raw), bits=wide, width=segment.width)
            codes[segment.dtype] |= set(found.reshape(-1).tolist())
            padded.add((segment.dtype, segment.width * wide % 8))
    assert codes["int2"] == set(range(-2, 2))
    assert codes["int4"] == set(range(-8, 8))
    assert {-128, -127, 127} <= codes["int8"]
    assert kinds == {
        ("int8", "fp16"), ("int8", "fp32"), ("int4", "fp16"), ("int4", "fp32"), ("int2", "fp16"),
        ("int2", "fp32"), ("bf16", None), ("fp16", None), ("fp32", None),
    }  # fmt: skip
    assert {("int4", 4), ("int2", 2), ("int2", 4)} <= padded


def test_vectors_of_the_hash_are_right() -> None:
    described = json.loads(HASHES.read_text(encoding="utf-8"))
    assert [length for length, _ in described["hashes"]] == list(HASHED_LENGTHS)
    for length, digest in described["hashes"]:
        assert xxhash.xxh3_64_hexdigest(hashed_bytes(length)) == digest


def test_the_folder_holds_no_other_vectors() -> None:
    assert {path.stem for path in VECTORS.glob("*.safetensors")} == set(VECTOR_SOURCES)


def test_document_states_every_rule_that_the_reader_cites() -> None:
    package = Path(sys.modules["pleexport"].__path__[0])
    modules = ("blob", "blob_header", "blob_layout")
    reader = "".join((package / "runtime" / f"{m}.py").read_text(encoding="utf-8") for m in modules)
    stated = re.findall(r"^- \*\*(B-\d\d)\*\*", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"B-\d\d", reader)) <= set(stated)
    assert stated == [f"B-{i:02}" for i in range(1, len(stated) + 1)]
    tied = "".join((package / "runtime" / f"{m}.py").read_text() for m in ("blob", "tied"))
    stated = re.findall(r"^- \*\*(T-\d\d)\*\*", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"T-\d\d", tied)) <= set(stated)
    assert stated == [f"T-{i:02}" for i in range(1, len(stated) + 1)]


@pytest.mark.parametrize("name", TIED_SOURCES)
def test_tied_vector_is_what_is_written_and_read(name: str, tmp_path: Path) -> None:
    made, path = TIED_SOURCES[name](), VECTORS / "tied" / f"{name}.safetensors"
    write_tied(made, tmp_path / "tied")
    assert path.read_bytes() == (tmp_path / "tied").read_bytes()
    assert path.stat().st_size <= LARGEST_VECTOR
    expected = np.array(expected_of(path)["vectors"], dtype=np.float32)
    np.testing.assert_array_equal(expected, made.vectors)
    rows = TiedRows(path)
    rows.verify()
    np.testing.assert_array_equal(rows.lookup(np.arange(rows.num_rows)), expected)
    decode_tied = documents_functions()["decode_tied"]
    for row, vector in enumerate(expected):
        np.testing.assert_array_equal(decode_tied(path, row), vector)
    damaged = bytearray(path.read_bytes())
    damaged[made.layout.scales_offset] ^= 1
    (tmp_path / "tied").write_bytes(damaged)
    with pytest.raises(AssertionError, match="a damaged row"):
        decode_tied(tmp_path / "tied", 0)


def test_tied_vectors_hold_all_that_can_be_told_apart() -> None:
    assert {p.stem for p in (VECTORS / "tied").glob("*.safetensors")} == set(TIED_SOURCES)
    sources = {name: make() for name, make in TIED_SOURCES.items()}
    assert all((made.scales < 0).any() and (made.scales > 0).any() for made in sources.values())
    assert all(made.layout.width % made.layout.group_size for made in sources.values())
    for name, made in sources.items():
        wide = bits(name)
        found = set((made.codes[..., None] >> np.arange(0, 8, wide) & (2**wide - 1)).reshape(-1))
        assert {0, 2**wide - 1} <= {int(code) for code in found} or name == "int8"


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_vector_is_what_the_writer_writes(name: str, tmp_path: Path) -> None:
    make, table_dtype = VECTOR_SOURCES[name]
    write(make(), tmp_path / "blob", table_dtype)
    committed = (VECTORS / f"{name}.safetensors").read_bytes()
    assert committed == (tmp_path / "blob").read_bytes()
    assert len(committed) <= LARGEST_VECTOR


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_vector_read_by_the_package_has_its_values(name: str) -> None:
    path = VECTORS / f"{name}.safetensors"
    blob, expected = Blob(path), expected_of(path)
    blob.verify()
    found = blob.lookup(blob.row_ids(range(blob.num_rows)))
    assert list(found) == list(expected["tables"])
    for table_name, rows in expected["tables"].items():
        np.testing.assert_array_equal(found[table_name], np.array(rows, dtype=np.float32))


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_vector_read_by_the_documents_decoder_has_its_values(name: str, decode: Decoder) -> None:
    path = VECTORS / f"{name}.safetensors"
    for table_name, rows in expected_of(path)["tables"].items():
        for token_id, row in enumerate(rows):
            vectors = decode([path], token_id)
            own = [v for n, v in vectors.items() if n.split(".")[0] == table_name]
            expected = np.array(row, dtype=np.float32).reshape(len(own), -1)
            np.testing.assert_array_equal(np.stack(own), expected)


def test_the_documents_decoder_refuses_damage(decode: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    write(example(), path, "source")
    decode([path], 1)
    sound = path.read_bytes()
    for position, problem in ((9000, r"\Z"), (16384 + 64, "a damaged row")):
        changed = bytearray(sound)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(AssertionError, match=problem):
            decode([path], 1)


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_vector_is_within_half_a_step_of_its_source(name: str) -> None:
    make, table_dtype = VECTOR_SOURCES[name]
    made, blob = make(), Blob(VECTORS / f"{name}.safetensors")
    found = blob.lookup(np.arange(blob.num_rows))
    for segment in blob.segments:
        layer = segment.layer or 0
        wanted = made.vectors(segment.table)[:, layer]
        got = found[segment.table].reshape(blob.num_rows, -1, segment.width)[:, layer]
        if table_dtype == "source" or table_dtype in ("fp32", "bf16"):
            np.testing.assert_array_equal(got, wanted * np.float32(segment.multiplier))
            continue
        got = got / np.float32(segment.multiplier)
        if segment.group_size is None:
            np.testing.assert_allclose(got, wanted, rtol=2.0**-10)
            continue
        scales = _scales(blob, segment, slice(None)).astype(np.float32)
        steps = np.repeat(scales, segment.group_size, axis=-1)[:, : segment.width]
        within = np.abs(got - wanted) <= 0.5001 * steps
        clipped = (np.abs(got) > 6.99 * steps) & (np.abs(wanted) > np.abs(got))
        assert np.all(within | (clipped & (segment.dtype == "int4")))


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_vector_opens_as_safetensors(name: str) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(VECTORS / f"{name}.safetensors")
    dtypes = {"header_checksum": "uint64", "rows": "uint8", "checksums": "uint64"}
    assert {n: str(t.dtype) for n, t in tensors.items()} == dtypes


def main() -> None:
    """Write the vectors anew, and the header and the hexdump of the document."""
    VECTORS.mkdir(exist_ok=True)
    for name, (make, table_dtype) in VECTOR_SOURCES.items():
        path = VECTORS / f"{name}.safetensors"
        write(make(), path, table_dtype)
        blob = Blob(path)
        found = blob.lookup(blob.row_ids(range(blob.num_rows)))
        tables = {n: v.astype(np.float64).tolist() for n, v in found.items()}
        described = {"row_aliases": blob.row_aliases, "tables": tables}
        path.with_suffix(".json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    hashes = [(n, xxhash.xxh3_64_hexdigest(hashed_bytes(n))) for n in HASHED_LENGTHS]
    described = {"input": "byte i is (131 i + 17) mod 256", "seed": 0, "hashes": hashes}
    HASHES.write_text(json.dumps(described) + "\n", encoding="utf-8")
    for name, make_tied in TIED_SOURCES.items():
        made = make_tied()
        path = VECTORS / "tied" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_tied(made, path)
        described = {
            "table": made.layout.table,
            "vectors": made.vectors.astype(np.float64).tolist(),
        }
        path.with_suffix(".json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    path, tied = VECTORS / "example.safetensors", VECTORS / "example.tied"
    write(example(), path, "source")
    write_tied(tied_example(), tied)
    text = DOCUMENT.read_text(encoding="utf-8")
    old = [f"```text\n{block}\n```" for block in code_blocks("text")]
    blocks = (
        render_header(path),
        render_hexdump(path),
        render_header(tied),
        render_tied_hexdump(tied, tied_example().layout),
    )
    for block, new in zip(old, blocks, strict=True):
        text = text.replace(block, f"```text\n{new}\n```")
    element = re.compile(r"^Row 0, element 0: .*?\n\n", re.MULTILINE | re.DOTALL)
    text = element.sub(f"{render_tied_element(tied_example())}\n\n", text, count=1)
    element = re.compile(r"^Token id 0, .*?\n\n", re.MULTILINE | re.DOTALL)
    text = element.sub(f"{render_element(path)}\n\n", text, count=1)
    DOCUMENT.write_text(text, encoding="utf-8")
    path.unlink()
    tied.unlink()


if __name__ == "__main__":
    main()
