"""Quantizers keep their promise for any finite input."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pleexport.quantize import (
    dequantize_rows,
    pack_nibbles,
    quantize_blocks,
    quantize_rows,
    unpack_nibbles,
)

VALUES = st.floats(-1e5, 1e5, width=32)


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=VALUES),
    group_size=st.integers(1, 40),
)
def test_every_value_is_within_half_a_stored_step(
    bits: int, values: NDArray[np.float32], group_size: int
) -> None:
    codes, scales = quantize_rows(values, bits=bits, group_size=group_size)
    assert np.abs(codes).max() <= {8: 127, 4: 7}[bits]
    got = dequantize_rows(codes, scales, group_size=group_size)
    steps = np.repeat(scales.astype(np.float32), group_size, axis=-1)[:, : values.shape[1]]
    assert (np.abs(got - values) <= steps * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e9])
def test_values_beyond_the_scales_are_refused(value: float) -> None:
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match=r"not finite, or exceed the range of float16 scales"),
    ):
        quantize_rows(np.full((1, 4), value, dtype=np.float32), bits=8, group_size=4)


@given(codes=arrays(np.int8, st.integers(1, 33), elements=st.integers(-8, 7)))
def test_nibbles_survive_packing(codes: NDArray[np.int8]) -> None:
    packed = pack_nibbles(codes)
    assert len(packed) == -(-len(codes) // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed, width=len(codes)), codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [64, 40])
def test_blocks_mean_what_onnx_runtime_takes_them_for(bits: int, inputs: int) -> None:
    generator = np.random.default_rng(bits)
    weight = generator.standard_normal((24, inputs)).astype(np.float32)
    x = generator.standard_normal((3, inputs)).astype(np.float32)
    codes, scales = quantize_blocks(weight, bits=bits, block_size=32)
    got = matmul_nbits(x, codes, scales, bits=bits, inputs=inputs)
    # A plain dequantizer: the zero point is half the code range.
    levels = codes if bits == 8 else np.stack((codes & 15, codes >> 4), -1).reshape(24, -1, 32)
    plain = (levels.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    plain = plain.reshape(24, -1)[:, :inputs]
    np.testing.assert_allclose(got, x @ plain.T, atol=1e-4)
    assert np.abs(plain - weight).max() < np.abs(weight).max() * {8: 0.01, 4: 0.13}[bits]


def matmul_nbits(x: Any, codes: Any, scales: Any, *, bits: int, inputs: int) -> Any:
    """Run one MatMulNBits with full precision activations."""
    helper, kinds = onnx.helper, onnx.TensorProto
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft",
        K=inputs, N=len(codes), bits=bits, block_size=32, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kinds.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", kinds.FLOAT, None)],
        [onnx.numpy_helper.from_array(codes, "b"), onnx.numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
