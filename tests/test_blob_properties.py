"""What holds for any blob: it gives back what was written, and any damage is found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from blob_sources import KINDS, Model, Source, example, quantized_rows, table, values, write
from hypothesis import given, settings
from hypothesis import strategies as st
from resealed import change_rows
from test_blob_format_doc import documents_decoder

from pleexport import codes as package_codes
from pleexport.dtypes import CODED
from pleexport.errors import BlobError, CheckFailed, PleexportError
from pleexport.export.blob_writer import write_blob
from pleexport.export.segments import plan_segments
from pleexport.model import Codes, Table
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import CHECKSUM_BYTES, Segment, scale_bytes
from pleexport.sizes import align


@st.composite
def tables(draw: st.DrawFn, rows: int) -> tuple[Table, ...]:
    made = []
    for i in range(draw(st.integers(1, 3))):
        width = draw(st.integers(1, 40))
        codes = None
        if draw(st.booleans()):
            codes = Codes(
                draw(st.sampled_from(CODED)),
                draw(st.integers(1, width)),
                draw(st.sampled_from(["fp16", "fp32"])),
            )
        made.append(
            table(
                f"t{i}",
                width=width,
                layers=draw(st.none() | st.integers(1, 3)),
                multiplier=draw(st.floats(1e-3, 1e3)),
                rows=rows,
                codes=codes,
            )
        )
    return tuple(made)


@st.composite
def sources(draw: st.DrawFn) -> Source:
    rows = draw(st.integers(1, 5))
    made = draw(tables(rows))
    kind = KINDS[draw(st.sampled_from([*KINDS]))]
    tensors = {
        t.name: quantized_rows(t, seed=i)
        if t.codes
        else values(rows, t.row_width, seed=i).astype(kind)
        for i, t in enumerate(made)
    }
    aliases = {rows - 1: draw(st.integers(0, rows - 2))} if rows > 1 and draw(st.booleans()) else {}
    return Source(Model(made, rows, aliases), tensors)


def loosened(segments: list[Segment], gap: int) -> list[Segment]:
    """Other places that the format allows: `gap` steps more between all parts."""
    moved: list[Segment] = []
    position = 0
    for segment in segments:
        offset = align(position, 4) + 4 * gap
        scale_offset = None
        if segment.scale_offset is not None and segment.scale_dtype is not None:
            step = scale_bytes(segment.scale_dtype)
            scale_offset = align(offset + segment.code_bytes, step) + gap * step
        moved.append(msgspec.structs.replace(segment, offset=offset, scale_offset=scale_offset))
        position = moved[-1].end
    return moved


@settings(max_examples=150)
@given(made=sources(), gap=st.integers(0, 2), noise=st.integers(0, 255))
def test_what_was_written_comes_back_in_both_decoders(
    made: Source, gap: int, noise: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "blob"
    segments = loosened(plan_segments(made.model.tables, "source", made.dtype), gap)
    write_blob(made, path, segments=segments, page_size=16384)  # type: ignore[arg-type]
    fill_padding(path, segments, noise)
    decode, blob = documents_decoder(), Blob(path)
    blob.verify()
    ids = blob.row_ids(range(blob.num_rows))
    assert ids.tolist() == [made.model.row_aliases.get(i, i) for i in range(blob.num_rows)]
    found = blob.lookup(ids)
    for own in made.model.tables:
        expected = made.vectors(own.name)[ids] * np.float32(own.multiplier)
        np.testing.assert_array_equal(found[own.name].reshape(expected.shape), expected)
        for token_id in range(blob.num_rows):
            vectors = decode([path], token_id)
            mine = [v for n, v in vectors.items() if n.split(".")[0] == own.name]
            np.testing.assert_array_equal(np.stack(mine), expected[token_id])


def fill_padding(path: Path, segments: list[Segment], noise: int) -> None:
    def fill(rows: Any) -> None:
        used = np.zeros(rows.shape[1], dtype=bool)
        used[-CHECKSUM_BYTES:] = True
        for segment in segments:
            used[segment.offset : segment.offset + segment.code_bytes] = True
            if segment.scale_offset is not None:
                used[segment.scale_offset : segment.end] = True
        rows[:, ~used] = noise

    change_rows(path, fill)


def test_a_reader_that_takes_the_upper_bits_first_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "blob", example()
    write(made, path, "source")
    turned = {bits: words.byteswap() for bits, words in package_codes._CODES_OF_A_BYTE.items()}
    for bits, name in ((2, "embed_tokens"), (4, "per_layer")):
        expected = Blob(path).lookup(np.arange(3))[name]
        with monkeypatch.context() as patch:
            patch.setitem(package_codes._CODES_OF_A_BYTE, bits, turned[bits])
            assert (Blob(path).lookup(np.arange(3))[name] != expected).any()


@contextmanager
def changed(path: Path, position: int, mask: int) -> Iterator[None]:
    """The file with bits of one byte turned."""
    descriptor = os.open(path, os.O_RDWR)
    (byte,) = os.pread(descriptor, 1, position)
    os.pwrite(descriptor, bytes([byte ^ mask]), position)
    try:
        yield
    finally:
        os.pwrite(descriptor, bytes([byte]), position)
        os.close(descriptor)


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    """By opening the file, by looking its row up, or by verification; nothing else comes out."""
    path = tmp_path / "blob"
    write(example(), path, "source")
    sound = Blob(path)
    sound.verify()
    stride, begin = sound.row_stride, sound.rows_offset
    text_ends = path.read_bytes().rindex(b"}", 0, begin)
    for position in range(sound.nbytes):
        row = (position - begin) // stride
        masks = (1 << position % 8, 0xFF)
        if position <= text_ends:  # where an upper case letter may mean the same
            masks = tuple(1 << bit for bit in range(8))
        for mask in masks:
            with changed(path, position, mask):
                if position < begin:
                    with pytest.raises((BlobError, CheckFailed)):
                        Blob(path)
                    continue
                blob = Blob(path)
                for other in {*range(sound.num_rows)} - {row}:
                    blob.lookup(np.array([other]))
                if row < sound.num_rows:
                    with pytest.raises(CheckFailed, match=f"the row of token id {row} does"):
                        blob.lookup(np.array([row]))
                with pytest.raises(CheckFailed):
                    blob.verify()
    sound.verify()


def test_any_truncated_or_longer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    write(example(), path, "source")
    raw = path.read_bytes()
    for length in {*range(0, len(raw), 61), *range(len(raw) - 70, len(raw))}:
        path.write_bytes(raw[:length])
        with pytest.raises(PleexportError):
            Blob(path)
    for more in (b"\0", raw):
        path.write_bytes(raw + more)
        with pytest.raises(BlobError):
            Blob(path)
