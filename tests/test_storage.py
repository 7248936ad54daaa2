"""How dense weights are stored, and how large that is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pleexport.backends.onnx.blocks import quantize_blocks
from pleexport.backends.onnx.storage import OnnxStorage
from pleexport.dtypes import QUANTIZED, bits
from pleexport.model import Weight
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
