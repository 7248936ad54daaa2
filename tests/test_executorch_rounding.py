"""How ExecuTorch bundles store dense weights: sizes, codes and scales. Needs no ExecuTorch."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pleexport import families
from pleexport.backends.executorch.rounding import round_matrix
from pleexport.backends.executorch.storage import ExecutorchStorage
from pleexport.backends.onnx.blocks import quantize_blocks
from pleexport.backends.onnx.storage import OnnxStorage
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.codes import pack_codes
from pleexport.model import Weight
from pleexport.weights import BLOCK_SIZES, WeightRequest


@pytest.mark.parametrize(
    ("inputs", "most", "dtype", "group"),
    [
        (1536, 256, "int4", 256),
        (1536, 64, "int4", 64),
        (192, 256, "int4", 192),
        (192, 128, "int4", 96),
        (32, 32, "int4", 32),
        (32, 16, "int8", 32),
        (33, 256, "int8", 33),
        (8, 256, "int8", 8),
    ],
)
def test_a_matrix_without_a_group_is_widened(
    inputs: int, most: int, dtype: str, group: int
) -> None:
    weight = Weight("weight", (4, inputs), "quantizable")
    storage = ExecutorchStorage(WeightRequest("int4", block_size=most))  # type: ignore[arg-type]
    assert storage.dtype_of(weight) == dtype
    assert storage.group_of(weight) == group


@given(
    inputs=st.integers(1, 300),
    most=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(["fp32", "int8", "int4"]),
    seed=st.integers(0, 99),
)
def test_sizes_are_those_of_codes_and_scales(inputs: int, most: int, dtype: str, seed: int) -> None:
    weight = Weight("weight", (3, inputs), "quantizable")
    storage = ExecutorchStorage(WeightRequest(dtype, most))  # type: ignore[arg-type]
    stored = storage.dtype_of(weight)
    if stored == "fp32":
        assert storage.file_bytes(weight) == 12 * inputs
        return
    values = np.random.default_rng(seed).normal(size=weight.shape).astype(np.float32)
    bits = 4 if stored == "int4" else 8
    rounded = round_matrix(values, bits=bits, group=storage.group_of(weight))
    codes, width = pack_codes(rounded.codes, bits=bits), 2 if bits == 4 else 4
    assert storage.file_bytes(weight) == codes.nbytes + width * rounded.scales.size
    assert storage.resident_bytes(weight) >= storage.file_bytes(weight)


def test_widened_matrices_are_said(gemma4_checkpoint: Path) -> None:
    model = families.resolve(Checkpoint(gemma4_checkpoint))
    (note,) = ExecutorchStorage(WeightRequest("int4")).notes(model)
    assert note == (
        "3 matrices are stored in int8, `layers.0.mlp.down_proj.weight` first: XNNPACK takes int4 "
        "in groups of 32 weights or a multiple up to 256, and none divides 48 inputs"
    )
    assert ExecutorchStorage(WeightRequest("int8")).notes(model) == []
    assert OnnxStorage(WeightRequest("int4")).notes(model) == []


def test_other_weights_stay_in_float32() -> None:
    storage = ExecutorchStorage(WeightRequest("int4"))
    assert storage.dtype_of(Weight("norm", (64,))) == "fp32"
    assert storage.file_bytes(Weight("norm", (64,))) == 256


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_positive_and_exact(bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
    values[3] = 0
    values[4] = -np.abs(values[4])
    values[5] *= 1e-34
    rounded = round_matrix(values, bits=bits, group=64 if bits == 4 else 256)
    assert (rounded.scales > 0).all()
    narrowed = rounded.scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    # XNNPACK takes bfloat16 with groups only; the control is that 8 bits keep more.
    assert np.array_equal(narrowed, rounded.scales) == (bits == 4)
    # The control: the same search for ONNX Runtime uses both signs.
    assert (quantize_blocks(values, bits=bits, block_size=64).scales < 0).any()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 128)])
def test_values_are_within_rounding(bits: int, group: int) -> None:
    values = np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32)
    rounded = round_matrix(values, bits=bits, group=group)
    got = rounded.codes.reshape(64, -1, group) * rounded.scales[..., None]
    error = np.sqrt(np.mean((got.reshape(values.shape) - values) ** 2))
    assert error < {4: 0.13, 8: 0.01}[bits]
    limit = 2 ** (bits - 1)
    assert -limit <= rounded.codes.min() < rounded.codes.max() == limit - 1


def test_importance_moves_the_error_to_where_it_counts_less() -> None:
    values = np.random.default_rng(2).normal(size=(64, 64)).astype(np.float32)
    importance = np.ones(64, np.float32)
    importance[:8] = 1000
    errors = []
    for given_importance in (None, importance):
        rounded = round_matrix(values, bits=4, group=64, importance=given_importance)
        difference = rounded.codes * rounded.scales - values
        errors.append(np.square(difference[:, :8]).mean())
    assert errors[1] < 0.8 * errors[0]


def test_values_that_cannot_be_stored_are_refused() -> None:
    for bad, what in ((np.nan, "not finite"), (np.inf, "not finite")):
        values = np.ones((2, 32), np.float32)
        values[1, 3] = bad
        with pytest.raises(ValueError, match=what):
            round_matrix(values, bits=4, group=32)
    with pytest.raises(ValueError, match="too large"), np.errstate(all="ignore"):
        round_matrix(np.full((1, 32), 3e38, np.float32), bits=4, group=32)


def test_nibbles_have_the_first_code_low() -> None:
    codes = np.array([[-8, 7, 0, -1]], dtype=np.int8)
    assert pack_codes(codes, bits=4).tolist() == [[0xF0, 0x78]]
