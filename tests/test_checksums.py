"""No flipped bit of a bundle gives another logit: what is loaded is compared with checksums."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from resealed import change_checksums, change_manifest

import pleexport
from pleexport.checksums import (
    CHECKSUMS,
    CHUNK_BYTES,
    Checksums,
    check_files,
    checksums_of,
    sha256_and_checksums,
)
from pleexport.errors import BundleError, CheckFailed, PleexportError

SAMPLE = Path(__file__).parents[1] / "samples" / "gemma4-kjv"
IDS = [2, 651, 94, 17]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample for phones: int4 weights, a tied head, a tokenizer."""
    out = tmp_path_factory.mktemp("checksums") / "bundle"
    return pleexport.build(SAMPLE, out, target="android", verify=False).path


@pytest.fixture(scope="session")
def expected(bundle: Path) -> NDArray[np.float32]:
    return pleexport.Runner(bundle, threads=1).logits(IDS)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def places(path: Path, count: int) -> list[int]:
    """Bits of a file: its first, its last, and others at random."""
    bits = 8 * path.stat().st_size
    return [0, bits - 1, *random.Random(path.name).sample(range(bits), min(count, bits))]


FILES = [
    *("manifest.json", "checksums.json", "model.onnx", "model.onnx.data", "tied.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_what_is_loaded_is_an_error(
    name: str, copy: Path, expected: NDArray[np.float32], capfd: pytest.CaptureFixture[str]
) -> None:
    for bit in places(copy / name, 6):
        flip(copy / name, bit)
        with pytest.raises(PleexportError) as caught:
            pleexport.Runner(copy, threads=1).logits(IDS)
        assert name in caught.value.message or name == CHECKSUMS
        assert caught.value.hint
        flip(copy / name, bit)
    assert np.array_equal(pleexport.Runner(copy, threads=1).logits(IDS), expected)
    assert capfd.readouterr() == ("", ""), "ONNX Runtime says nothing of its own"


def test_a_flipped_bit_of_a_row_is_an_error_when_it_is_looked_up(
    copy: Path, expected: NDArray[np.float32]
) -> None:
    blob = copy / "embeddings.safetensors"
    for bit in places(blob, 60):
        flip(blob, bit)
        try:
            logits = pleexport.Runner(copy, threads=1).logits(IDS)
        except PleexportError:
            pass
        else:  # the row of another token id, which `verify` finds
            assert np.array_equal(logits, expected)
            with pytest.raises(CheckFailed):
                pleexport.verify(copy)
        flip(blob, bit)


@pytest.mark.parametrize("name", [*FILES, "embeddings.safetensors"])
def test_verify_finds_a_flipped_bit_of_every_file(name: str, copy: Path) -> None:
    for bit in places(copy / name, 3):
        flip(copy / name, bit)
        with pytest.raises(PleexportError):
            pleexport.verify(copy)
        flip(copy / name, bit)
    assert pleexport.verify(copy) is None


def test_without_the_check_a_flipped_weight_gives_other_logits(
    copy: Path, expected: NDArray[np.float32]
) -> None:
    weights = copy / "model.onnx.data"
    for i in range(1, 20):
        flip(weights, 8 * (weights.stat().st_size * i // 20) + 6)
    with pytest.raises(CheckFailed, match=r"model\.onnx\.data` is damaged: chunk \d of \d"):
        pleexport.Runner(copy)
    unchecked = pleexport.Runner(copy, threads=1, verify=False).logits(IDS)
    assert not np.array_equal(unchecked, expected)


def test_packed_weights_are_checked_too(
    copy: Path, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    first = pleexport.Runner(copy, threads=1, packed_weights=packed).logits(IDS)
    (place,) = packed.iterdir()
    for name in ("model.onnx", "model.onnx.data", "checksums.json"):
        for bit in places(place / name, 3):
            flip(place / name, bit)
            with pytest.raises(CheckFailed) as caught:
                pleexport.Runner(copy, packed_weights=packed)
            assert caught.value.hint == f"remove `{place}`; it is written again at the next use"
            flip(place / name, bit)
    again = pleexport.Runner(copy, threads=1, packed_weights=packed).logits(IDS)
    assert np.array_equal(first, again)


def test_damaged_weights_are_not_packed(copy: Path, tmp_path: Path) -> None:
    flip(copy / "model.onnx.data", 8 * 100_000)
    with pytest.raises(CheckFailed):
        pleexport.Runner(copy, packed_weights=tmp_path / "packed")
    assert list((tmp_path / "packed").iterdir()) == []
    # What was packed unchecked is not taken for what was checked.
    pleexport.Runner(copy, packed_weights=tmp_path / "packed", verify=False)
    with pytest.raises(CheckFailed):
        pleexport.Runner(copy, packed_weights=tmp_path / "packed")


def test_a_bundle_without_checksums_is_refused_unless_told(copy: Path) -> None:
    (copy / CHECKSUMS).unlink()
    with pytest.raises(BundleError, match=r"checksums\.json` cannot be read \(No such file"):
        pleexport.Bundle(copy)
    assert pleexport.Bundle(copy, verify=False).checksums is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"format": "pleexport-checksums", "version": 2, "files": {}}', "is damaged"),
        ('{"files": {"model.onnx": ["xyz"]}}', "is damaged"),
        ('{"files": {}}', r"manifest\.json` is damaged"),
    ],
)
def test_malformed_checksums_are_refused(content: str, message: str, copy: Path) -> None:
    (copy / CHECKSUMS).write_text(content)
    with pytest.raises(CheckFailed, match=message):
        pleexport.Bundle(copy)


def test_checksums_of_other_files_are_refused(copy: Path) -> None:
    (copy / "more").write_text("x")
    change_checksums(copy)
    with pytest.raises(CheckFailed, match="it and the manifest disagree about `more`"):
        pleexport.Bundle(copy)


def test_a_number_that_no_memory_holds_is_one_sentence(copy: Path) -> None:
    change_manifest(copy, lambda manifest: manifest.update(context=10**15))
    with pytest.raises(BundleError, match="cannot have caches for 1,000,000,000,000,000"):
        pleexport.Runner(copy)


@given(st.binary(max_size=40), st.integers(0, 3))
def test_checksums_are_of_chunks_of_a_mebibyte(data: bytes, more: int) -> None:
    data = data + bytes(more * CHUNK_BYTES)
    plain = [data[i : i + 1_048_576] for i in range(0, len(data), 1_048_576)]
    assert checksums_of(data) == [f"{xxhash.xxh3_64_intdigest(part):016x}" for part in plain]


def test_a_long_file_is_checked_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(np.random.default_rng(0).bytes(70 * CHUNK_BYTES + 5))
    checksums = Checksums(files={"long": sha256_and_checksums(path)[1]})
    check_files([path], checksums)
    flip(path, 8 * (66 * CHUNK_BYTES + 7))
    with pytest.raises(CheckFailed, match="chunk 66 of 71, at byte 69,206,016, does not match"):
        check_files([path], checksums)
    flip(path, 8 * (66 * CHUNK_BYTES + 7))
    flip(path, 8 * (3 * CHUNK_BYTES + 7))
    with pytest.raises(CheckFailed, match="chunk 3 of 71, at byte 3,145,728, does not match"):
        check_files([path], checksums)
    with path.open("ab") as file:
        file.write(b"more" * CHUNK_BYTES)
    with pytest.raises(CheckFailed, match="long` is damaged"):
        check_files([path], checksums)


def test_the_file_of_checksums_has_the_form_of_its_specification(bundle: Path) -> None:
    found = json.loads((bundle / CHECKSUMS).read_text())
    assert list(found) == ["format", "version", "chunk_bytes", "files"]
    names = {path.name for path in bundle.iterdir()} - {CHECKSUMS}
    assert set(found["files"]) == names
    for name in names:
        assert found["files"][name] == checksums_of((bundle / name).read_bytes())
