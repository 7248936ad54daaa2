"""How dense weights are stored, and how large that is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MANY_FILES_LIMIT, relative_error
from hypothesis import given
from hypothesis import strategies as st

import pleexport
from pleexport.backends.onnx.blocks import quantize_blocks
from pleexport.backends.onnx.storage import LARGEST_DATA_FILE, OnnxStorage, data_places
from pleexport.dtypes import QUANTIZED, bits
from pleexport.errors import CheckFailed
from pleexport.model import Weight
from pleexport.show.bundle import describe_bundle
from pleexport.tied_layout import TIED
from pleexport.weights import BLOCK_SIZES, WeightRequest


@pytest.mark.parametrize(
    ("inputs", "most", "expected"),
    [
        (1536, 256, 256),
        (1536, 64, 64),
        (192, 256, 64),
        (192, 32, 32),
        (128, 256, 128),
        (8, 256, 16),
    ],
)
def test_a_matrix_gets_the_largest_block_that_wastes_nothing(
    inputs: int, most: int, expected: int
) -> None:
    weight = Weight("weight", (4, inputs), "quantizable")
    assert OnnxStorage(WeightRequest("int4", block_size=most)).block_size_of(weight) == expected


@given(
    inputs=st.integers(1, 700),
    most=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(QUANTIZED),
    symmetric=st.booleans(),
)
def test_no_block_size_that_is_allowed_takes_fewer_bytes(
    inputs: int, most: int, dtype: str, symmetric: bool
) -> None:
    weight = Weight("weight", (3, inputs), "quantizable")
    chosen = OnnxStorage(WeightRequest(dtype, most, symmetric))
    values = np.zeros(weight.shape, dtype=np.float32)
    sizes = {}
    for block_size in [size for size in BLOCK_SIZES if size <= most]:
        stored = quantize_blocks(
            values, bits=bits(dtype), block_size=block_size, symmetric=symmetric
        )
        sizes[block_size] = stored.codes.nbytes + stored.scales.nbytes
        if stored.zero_points is not None:
            sizes[block_size] += stored.zero_points.nbytes
    assert chosen.file_bytes(weight) == sizes[chosen.block_size_of(weight)]
    assert chosen.file_bytes(weight) == min(sizes.values())


def test_files_of_weights_end_before_they_are_too_large() -> None:
    half, whole = LARGEST_DATA_FILE // 2, LARGEST_DATA_FILE
    assert LARGEST_DATA_FILE == 1 << 30
    assert list(data_places([100, 100, 5000])) == [(0, 0), (0, 128), (0, 4096)]
    assert list(data_places([half, half, 1])) == [(0, 0), (0, half), (1, 0)]
    # What is larger is alone, wherever it comes.
    assert list(data_places([3, whole + 1, 3, 3])) == [(0, 0), (1, 0), (2, 0), (2, 64)]
    assert list(data_places([whole + 1])) == [(0, 0)]
    # What aligns a tensor counts too.
    assert list(data_places([1, whole - 4096])) == [(0, 0), (0, 4096)]
    assert list(data_places([1, whole - 4095])) == [(0, 0), (1, 0)]


def test_weights_in_many_files_compute_the_same(
    many_files_bundle: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = pleexport.Bundle(many_files_bundle)
    names = bundle.decoder.files
    assert names[:3] == ["model.onnx", "model.onnx.data", "model.onnx.data.1"]
    assert len(names) > 5
    assert names[-1] == TIED
    assert set(names[1:-1]) == {p.name for p in many_files_bundle.glob("model.onnx.data*")}
    values = ir.load(bundle.path / "model.onnx").graph.initializers.values()
    tensors = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    for name in names[1:-1]:
        own = [t for t in tensors if t.location == name]
        assert len(own) == 1 or bundle.path.joinpath(name).stat().st_size <= MANY_FILES_LIMIT
    assert "dense weights" in describe_bundle(bundle).split("model.onnx.data.3")[1][:60]

    one = pleexport.build(
        gemma4_checkpoint, tmp_path / "one", table_dtype="int8", weight_dtype="int8", verify=False
    )
    assert one.decoder.files == ["model.onnx", "model.onnx.data", TIED]
    assert one.decoder.weights_digest == bundle.decoder.weights_digest
    ids = list(range(40))
    expected = pleexport.Runner(one, threads=1).logits(ids)
    assert np.array_equal(pleexport.Runner(bundle, threads=1).logits(ids), expected)
    packed = pleexport.Runner(bundle, threads=1, packed_weights=tmp_path / "packed")
    assert relative_error(expected, packed.logits(ids)) < 1e-4
    assert pleexport.verify(bundle.path, checkpoint=gemma4_checkpoint) is not None


def test_each_file_of_weights_is_checked(many_files_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(many_files_bundle, tmp_path / "copy")
    for name in pleexport.Bundle(copy).decoder.files[1:]:
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 4
        (copy / name).write_bytes(data)
        with pytest.raises(CheckFailed, match=re.escape(f"{name}` is damaged")):
            pleexport.Runner(copy)
        data[-1] ^= 4
        (copy / name).write_bytes(data)
    pleexport.Runner(copy)  # the control
