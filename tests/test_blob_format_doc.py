"""docs/blob-format.md tells the truth: its hexdump, its decoder, and the test vectors.

Run as a script, this file writes the vectors and the generated parts of the document anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pleexport.export.blob_writer import write_blob
from pleexport.export.segments import plan_segments
from pleexport.model import Table
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import Segment

DOCUMENT = Path(__file__).parents[1] / "docs" / "blob-format.md"
VECTORS = Path(__file__).with_name("vectors")
PAGE_SIZE = 16_384
LARGEST_VECTOR = 32 * 1024
Decoder = Callable[[Path, int], dict[str, NDArray[np.float32]]]


class Model(NamedTuple):
    tables: tuple[Table, ...]
    num_rows: int
    row_aliases: dict[int, int]


@dataclass(frozen=True)
class Source:
    """What `write_blob` needs of a model whose tensors were found in a checkpoint."""

    model: Model
    tensors: dict[str, NDArray[Any]]

    @property
    def dtype(self) -> str:
        names = {np.dtype(np.float32): "fp32", np.dtype(ml_dtypes.bfloat16): "bf16"}
        (dtype,) = {names[tensor.dtype] for tensor in self.tensors.values()}
        return dtype

    def rows(self, table: Table, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        return self.tensors[table.name][rows]


def table(name: str, *, width: int, layers: int | None, multiplier: float, rows: int) -> Table:
    return Table(name, (f"{name}.weight",), rows, layers, width, name, multiplier)


def values(rows: int, width: int, *, seed: int) -> NDArray[np.float32]:
    """Fixed numbers in [-2, 2) that no random generator has to reproduce."""
    counter = np.arange(rows * width, dtype=np.uint64) + np.uint64(seed)
    mixed = counter * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)
    return ((mixed.astype(np.float32) - 32768) / 16384).reshape(rows, width)


def source(
    *, rows: int, width: int, layers: int, layer_width: int, aliases: dict[int, int]
) -> Source:
    tables = (
        table("embed_tokens", width=width, layers=None, multiplier=39.25, rows=rows),
        table("per_layer", width=layer_width, layers=layers, multiplier=2.828125, rows=rows),
    )
    tensors = {t.name: values(rows, t.row_width, seed=i) for i, t in enumerate(tables)}
    return Source(Model(tables, rows, aliases), tensors)


def bf16_source() -> Source:
    plain = source(rows=5, width=20, layers=2, layer_width=8, aliases={4: 1})
    tensors = {name: v.astype(ml_dtypes.bfloat16) for name, v in plain.tensors.items()}
    special = [0.0, -0.0, 1e-40, 3.0e36, -1.0 / 3.0]
    tensors["embed_tokens"][2, : len(special)] = np.array(special, dtype=ml_dtypes.bfloat16)
    return Source(plain.model, tensors)


def int4_source() -> Source:
    made = source(rows=6, width=72, layers=3, layer_width=32, aliases={})
    made.tensors["embed_tokens"][1] = 0  # a group of zeros has the scale 0
    made.tensors["per_layer"][2] *= 1e-7  # scales that float16 holds as subnormal numbers
    return made


VECTOR_SOURCES: dict[str, tuple[Callable[[], Source], str]] = {
    "int8": (
        lambda: source(rows=5, width=200, layers=2, layer_width=12, aliases={3: 0, 4: 0}),
        "int8",
    ),
    "int4": (int4_source, "int4"),
    "odd-width": (
        lambda: source(rows=4, width=33, layers=2, layer_width=7, aliases={}),
        "int4",
    ),
    "bf16-source": (bf16_source, "source"),
}


def example() -> Source:
    """The blob of the hexdump: three token ids, the last an alias of the first."""
    tables = (
        table("embed_tokens", width=5, layers=None, multiplier=2.25, rows=3),
        table("per_layer", width=3, layers=2, multiplier=1.75, rows=3),
    )
    tensors = {t.name: values(3, t.row_width, seed=i) for i, t in enumerate(tables)}
    return Source(Model(tables, 3, {2: 0}), tensors)


def write(made: Source, path: Path, table_dtype: str) -> None:
    segments = plan_segments(made.model.tables, table_dtype, made.dtype)  # type: ignore[arg-type]
    write_blob(made, path, segments=segments, page_size=PAGE_SIZE)  # type: ignore[arg-type]


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
    for name in ("header_checksum", "rows", "checksums"):
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
    for chunk, at in enumerate(range(blob.rows_offset + blob.rows.nbytes, len(data), 8)):
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
    raw = blob.rows[row]
    codes_end = segment.offset + segment.code_bytes
    packed = raw[segment.offset : codes_end].tolist()
    nibbles = [n - 8 for byte in packed for n in (byte & 15, byte >> 4)]
    codes = " ".join(str(n) for n in nibbles[: segment.width])
    pad = ", pad" if segment.width % 2 else ""
    yield segment.offset, codes_end, f"row {row}, {segment.name}: codes {codes}{pad}"
    assert segment.scale_offset is not None
    scale = raw[segment.scale_offset : segment.end].view("<f2")
    yield segment.scale_offset, segment.end, f"scale {float(scale[0])}"


def code_blocks(language: str) -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def decode() -> Decoder:
    """The decoder that the document prints."""
    (block,) = code_blocks("python")
    assert "pleexport" not in re.sub(r'"pleexport-blob"', "", block)
    namespace: dict[str, Any] = {}
    exec(compile(block, str(DOCUMENT), "exec"), namespace)
    return namespace["decode"]


def expected_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_document_shows_the_header_of_the_example(tmp_path: Path) -> None:
    write(example(), tmp_path / "blob", "int4")
    assert render_header(tmp_path / "blob") in code_blocks("text")


def test_document_shows_the_hexdump_of_the_example(tmp_path: Path) -> None:
    write(example(), tmp_path / "blob", "int4")
    assert render_hexdump(tmp_path / "blob") in code_blocks("text")


def test_document_states_every_rule_that_the_reader_cites() -> None:
    package = Path(sys.modules["pleexport"].__path__[0])
    modules = ("blob", "blob_header", "blob_layout")
    reader = "".join((package / "runtime" / f"{m}.py").read_text(encoding="utf-8") for m in modules)
    stated = re.findall(r"^- \*\*(B-\d\d)\*\*", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"B-\d\d", reader)) <= set(stated)
    assert stated == [f"B-{i:02}" for i in range(1, len(stated) + 1)]


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
            vectors = decode(path, token_id)
            own = [v for n, v in vectors.items() if n.split(".")[0] == table_name]
            expected = np.array(row, dtype=np.float32).reshape(len(own), -1)
            np.testing.assert_array_equal(np.stack(own), expected)


@pytest.mark.parametrize("name", VECTOR_SOURCES)
def test_vector_is_within_half_a_step_of_its_source(name: str) -> None:
    make, table_dtype = VECTOR_SOURCES[name]
    made, blob = make(), Blob(VECTORS / f"{name}.safetensors")
    found = blob.lookup(np.arange(blob.num_rows))
    for segment in blob.segments:
        layer = segment.layer or 0
        shape = (blob.num_rows, -1, segment.width)
        wanted = made.tensors[segment.table].astype(np.float32).reshape(shape)[:, layer]
        got = found[segment.table].reshape(shape)[:, layer] / np.float32(segment.multiplier)
        if table_dtype == "source":
            np.testing.assert_allclose(got, wanted, rtol=1e-6)
            continue
        assert segment.scale_offset is not None
        assert segment.group_size is not None
        raw = np.ascontiguousarray(blob.rows[:, segment.scale_offset : segment.end])
        steps = np.repeat(raw.view("<f2").astype(np.float32), segment.group_size, axis=-1)
        steps = steps[:, : segment.width]
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
    path = VECTORS / "example.safetensors"
    write(example(), path, "int4")
    text = DOCUMENT.read_text(encoding="utf-8")
    old = [f"```text\n{block}\n```" for block in code_blocks("text")]
    for block, new in zip(old, (render_header(path), render_hexdump(path)), strict=True):
        text = text.replace(block, f"```text\n{new}\n```")
    DOCUMENT.write_text(text, encoding="utf-8")
    path.unlink()


if __name__ == "__main__":
    main()
