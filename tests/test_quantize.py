"""Quantizers keep their promise for any finite input."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pleexport.backends.onnx.blocks import Blocks, quantize_blocks
from pleexport.codes import dequantize_rows, join_codes, pack_codes, unpack_codes
from pleexport.quantize import quantize_rows

VALUES = st.floats(-1e5, 1e5, width=32)


ROWS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=VALUES)
SMALLEST = np.full((1, 1), 1e-45, dtype=np.float32)


@settings(max_examples=60, deadline=None)
@given(values=ROWS, group_size=st.integers(1, 40))
@example(values=SMALLEST, group_size=1)
def test_int8_values_are_within_half_a_stored_step(
    values: NDArray[np.float32], group_size: int
) -> None:
    codes, scales = quantize_rows(values, bits=8, group_size=group_size)
    assert np.abs(codes).max() <= 127
    got = dequantize_rows(codes, scales, group_size=group_size)
    assert (np.abs(got - values) <= half_steps(scales, values, group_size)).all()


@settings(max_examples=60, deadline=None)
@given(values=ROWS, group_size=st.integers(1, 40))
@example(values=SMALLEST, group_size=1)
def test_int4_values_are_within_half_a_stored_step_or_clipped(
    values: NDArray[np.float32], group_size: int
) -> None:
    codes, scales = quantize_rows(values, bits=4, group_size=group_size)
    assert np.abs(codes).max() <= 7
    got = dequantize_rows(codes, scales, group_size=group_size)
    clipped = (np.abs(codes) == 7) & (np.abs(got) < np.abs(values))
    assert ((np.abs(got - values) <= half_steps(scales, values, group_size)) | clipped).all()


def half_steps(scales: Any, values: Any, group_size: int) -> Any:
    steps = np.repeat(scales.astype(np.float32), group_size, axis=-1)[:, : values.shape[1]]
    return steps * (0.5 + 1e-4)


def test_searched_int4_rows_are_closer_than_rounded_ones() -> None:
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    codes, scales = quantize_rows(values, bits=4, group_size=32)
    error = ((dequantize_rows(codes, scales, group_size=32) - values) ** 2).sum()
    grouped = values.reshape(64, -1, 32)
    steps = np.abs(grouped).max(-1, keepdims=True) / 7
    rounded = ((np.rint(grouped / steps) * steps - grouped) ** 2).sum()
    assert error < 0.97 * rounded


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e9])
def test_values_beyond_the_scales_are_refused(value: float) -> None:
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match=r"not finite, or exceed the range of float16 scales"),
    ):
        quantize_rows(np.full((1, 4), value, dtype=np.float32), bits=8, group_size=4)


CODES = st.sampled_from([8, 4, 2]).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        arrays(
            np.int8,
            st.tuples(st.integers(1, 3), st.integers(1, 33)),
            elements=st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        ),
    )
)


@given(case=CODES)
def test_codes_survive_packing(case: tuple[int, NDArray[np.int8]]) -> None:
    bits, codes = case
    packed = pack_codes(codes, bits=bits)
    width = codes.shape[-1]
    assert packed.shape == (len(codes), -(-width * bits // 8))
    np.testing.assert_array_equal(unpack_codes(packed, bits=bits, width=width), codes)


@given(case=CODES)
def test_packed_codes_lie_where_the_specification_says(
    case: tuple[int, NDArray[np.int8]],
) -> None:
    bits, codes = case
    offset = 0 if bits == 8 else 2 ** (bits - 1)
    for row, packed in zip(codes.tolist(), pack_codes(codes, bits=bits).tolist(), strict=True):
        stored = int.from_bytes(packed, "little")
        for i in range(8 * len(packed) // bits):
            code = row[i] if i < len(row) else 0
            assert stored >> (bits * i) & (2**bits - 1) == (code + offset) % 2**bits


def test_unpacking_with_the_wrong_bits_is_not_the_same() -> None:
    codes = np.array([[1, -2, 0, -1]], dtype=np.int8)
    packed = pack_codes(codes, bits=2)
    assert packed.tolist() == [[0b01_10_00_11]]
    assert unpack_codes(packed, bits=4, width=2).tolist() != codes[:, :2].tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_unsigned_codes_are_joined_from_the_lowest_bits(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    joined = int.from_bytes(join_codes(codes, bits=bits).tobytes(), "little")
    assert [joined >> (bits * i) & (2**bits - 1) for i in codes.tolist()] == codes.tolist()


@given(
    width=st.integers(1, 40),
    group_size=st.integers(1, 40),
    kind=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 99),
)
def test_each_code_is_multiplied_by_the_scale_of_its_group(
    width: int, group_size: int, kind: Any, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(-128, 128, (2, width)).astype(np.int8)
    scales = generator.random((2, -(-width // group_size))).astype(kind)
    got = dequantize_rows(codes, scales, group_size=group_size)
    for row in range(2):
        for e in range(width):
            scale = np.float32(scales[row, e // group_size])
            assert got[row, e] == np.float32(codes[row, e]) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("inputs", [128, 40])
@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_mean_what_onnx_runtime_takes_them_for(
    bits: int, inputs: int, block_size: int, symmetric: bool
) -> None:
    generator = np.random.default_rng(bits)
    weight = generator.standard_normal((24, inputs)).astype(np.float32) + np.float32(0.3)
    x = generator.standard_normal((3, inputs)).astype(np.float32)
    blocks = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    plain = dequantized(blocks, bits, inputs)
    got = matmul_nbits(x, blocks, bits=bits, inputs=inputs, block_size=block_size)
    np.testing.assert_allclose(got, x @ plain.T, atol=2e-4)
    assert np.abs(plain - weight).max() < np.abs(weight).max() * {8: 0.01, 4: 0.2}[bits]


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_blocks_are_closer_than_rounded_ones(symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    blocks = quantize_blocks(weight, bits=4, block_size=32, symmetric=symmetric)
    error = ((dequantized(blocks, 4, 256) - weight) ** 2).sum()
    grouped = weight.reshape(64, -1, 32)
    if symmetric:  # as llama.cpp's Q4_0 rounds
        extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
        steps, low, high = extreme / -8, -8, 7
    else:
        steps = (grouped.max(-1) - grouped.min(-1))[..., None] / 15
        low = np.rint(grouped.min(-1)[..., None] / steps)
        high = low + 15
    rounded = ((np.clip(np.rint(grouped / steps), low, high) * steps - grouped) ** 2).sum()
    assert error < 0.97 * rounded


def test_blocks_of_zeros_and_of_the_smallest_numbers_stay_finite() -> None:
    weight = np.zeros((2, 64), dtype=np.float32)
    weight[1] = 1e-42
    for symmetric in (True, False):
        blocks = quantize_blocks(weight, bits=4, block_size=32, symmetric=symmetric)
        assert np.abs(dequantized(blocks, 4, 64)).max() <= 1e-37


def dequantized(blocks: Blocks, bits: int, inputs: int) -> Any:
    """What codes, scales and zero points stand for, written from the operator's description."""
    count = blocks.scales.shape[1]

    def unpacked(packed: Any) -> Any:
        pairs = packed if bits == 8 else np.stack((packed & 15, packed >> 4), -1)
        return pairs.reshape(*packed.shape[:-1], -1).astype(np.float32)

    zero = np.full(blocks.scales.shape, 2.0 ** (bits - 1))
    if blocks.zero_points is not None:
        zero = unpacked(blocks.zero_points)[:, :count]
    values = (unpacked(blocks.codes) - zero[..., None]) * blocks.scales[..., None]
    return values.reshape(len(values), -1)[:, :inputs].astype(np.float32)


def matmul_nbits(x: Any, blocks: Blocks, *, bits: int, inputs: int, block_size: int) -> Any:
    """Run one MatMulNBits with full precision activations."""
    helper, kinds = onnx.helper, onnx.TensorProto
    stored = {"b": blocks.codes, "s": blocks.scales}
    if blocks.zero_points is not None:
        stored["z"] = blocks.zero_points
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft",
        K=inputs, N=len(blocks.codes), bits=bits, block_size=block_size, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kinds.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", kinds.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
