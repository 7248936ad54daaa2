"""Checkpoints that were trained for Q4_0: recognised by their values, and stored as trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import gemma4
from conftest import SAMPLES
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

import pleexport
from pleexport import families
from pleexport.backends.executorch.storage import ExecutorchStorage
from pleexport.backends.onnx.blocks import quantize_blocks
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.trained_grid import (
    ON_GRID,
    grid_distance,
    mark_grids,
    notes_on_grids,
)
from pleexport.codes import dequantize_rows
from pleexport.progress import Progress
from pleexport.quantize import quantize_rows
from pleexport.weights import WeightRequest

# Widths of whole groups; transformers' own are not trained for this format.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "hidden_size_per_layer_input": 32,
    "head_dim": 16,
    "global_head_dim": 32,
}
PLAIN = ("per_layer_input_gate.weight", "per_layer_projection.weight", "model_projection.weight")


def q4_0(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes `[N, K]`, -8 to 7, and scales `[N, K / 32]`, as ggml's `quantize_row_q4_0_ref`."""
    groups = values.reshape(len(values), -1, 32)
    at = np.abs(groups).argmax(axis=-1)[..., None]
    scales = np.take_along_axis(groups, at, axis=-1) / np.float32(-8)
    codes = np.minimum((groups / scales + np.float32(8.5)).astype(np.int8), 15) - 8
    stored = scales[..., 0].astype(np.float16).astype(np.float32)
    return codes.reshape(values.shape).astype(np.int8), stored


def projected(tensor: Tensor, *, noise: float = 0.0) -> Tensor:
    """A matrix on its Q4_0 grid, in bf16; noise in steps."""
    codes, scales = q4_0(tensor.float().numpy())
    steps = np.repeat(scales, 32, axis=-1)
    moved = codes + noise * np.random.default_rng(0).standard_normal(codes.shape)
    return from_numpy((moved * steps).astype(np.float32)).bfloat16()


def trained_gemma4(folder: Path, **changes: Any) -> Path:
    """A random Gemma 4 on a grid, but for the projections of its per-layer vectors."""
    gemma4(folder, **(SIZES | changes))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and not name.endswith(PLAIN):
            tensors[name] = projected(tensor, noise=0.02)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def marked(folder: Path) -> MatchedModel:
    checkpoint = Checkpoint(folder)
    return mark_grids(MatchedModel(families.resolve(checkpoint), checkpoint))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_gemma4(tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.fixture(scope="session")
def trained_bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> pleexport.Bundle:
    """By default, verified."""
    out = tmp_path_factory.mktemp("bundles") / "trained"
    return pleexport.build(trained, out, target="android")


def kl(bundle: pleexport.Bundle, what: str) -> float:
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["passed"]
    return float(next(f["kl"] for f in report["fidelity"] if f["what"] == what))


@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "uniform", "sparse"])
def test_numbers_on_a_grid_are_told_from_others(draw: str) -> None:
    generator = np.random.default_rng(0)
    if draw == "sparse":
        values = generator.standard_normal((64, 256)) * (generator.random((64, 256)) < 0.3)
    else:
        values = getattr(generator, draw)(size=(64, 256)) - (0.5 if draw == "uniform" else 0)
    values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert grid_distance(values) > 0.9
    tensor = from_numpy(values)
    assert grid_distance(projected(tensor).float().numpy()) < 0.04
    assert grid_distance(projected(tensor, noise=0.05).float().numpy()) < ON_GRID


def test_a_grid_of_8_bits_is_none_of_4() -> None:
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    steps = np.abs(values.reshape(64, -1, 32)).max(axis=-1).repeat(32, axis=-1) / 127
    assert grid_distance(np.rint(values / steps) * steps) > 0.9
    assert np.isnan(grid_distance(np.zeros((2, 64), np.float32)))


def test_what_was_trained_is_marked_and_nothing_else(trained: Path) -> None:
    model = marked(trained).model
    on_grid = {weight.name for weight in model.weights if weight.on_grid}
    expected = {weight.name for weight in model.weights if weight.precision != "full"}
    assert on_grid == {name for name in expected if not name.endswith(PLAIN)}
    assert "lm_head.weight" in on_grid
    assert all(table.on_grid for table in model.tables)


@pytest.mark.parametrize("name", ["gemma4-kjv", "gemma3n-kjv", "embformer-kjv", "rwkv7a-kjv"])
def test_a_model_that_was_not_trained_for_it_is_not_recognised(name: str) -> None:
    matched = marked(SAMPLES / name)
    assert not any(weight.on_grid for weight in matched.model.weights)
    assert not any(table.on_grid for table in matched.model.tables)
    assert notes_on_grids(matched) == []


def test_a_name_alone_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gemma4(tmp_path / "gemma-4-it-qat-q4_0-unquantized", **SIZES)
    bundle = pleexport.build(
        folder, tmp_path / "bundle", target="android", verify=False, progress=Progress()
    )
    assert "note: the name says q4_0, but no matrix lies on a grid" in capsys.readouterr().err
    assert not bundle.manifest.trained_grid
    assert {node.attributes["block_size"].as_int() for node in products(bundle)} != {32}
    assert bundle.manifest.table_dtype == "int8"


def products(bundle: pleexport.Bundle) -> list[ir.Node]:
    graph = ir.load(bundle.path / "model.onnx").graph
    return [node for node in graph if node.op_type == "MatMulNBits"]


def block_size(bundle: pleexport.Bundle, weight: str) -> int:
    nodes = (n for n in products(bundle) if n.inputs[1].name == f"{weight}.codes")
    return int(next(nodes).attributes["block_size"].as_int())


def test_matrices_are_stored_as_q4_0_stores_them(
    trained: Path, trained_bundle: pleexport.Bundle
) -> None:
    assert trained_bundle.manifest.trained_grid
    tensors = load_file(trained / "model.safetensors")
    compared = 0
    for node in products(trained_bundle):
        name = node.inputs[1].name.removesuffix(".codes")
        if name.endswith(PLAIN):
            assert node.attributes["bits"].as_int() == 8
            continue
        assert node.attributes["block_size"].as_int() == 32
        key = "model.embed_tokens.weight" if name == "lm_head.weight" else f"model.{name}"
        codes, scales = q4_0(tensors[key].float().numpy())
        packed, stored = (node.inputs[i].const_value.numpy() for i in (1, 2))
        got = np.stack((packed & 15, packed >> 4), axis=-1).reshape(codes.shape)
        np.testing.assert_array_equal(got.astype(np.int8) - 8, codes)
        # Q4_0's come from the largest value alone, which has noise of its own.
        np.testing.assert_allclose(stored, scales, rtol=2**-6)
        compared += 1
    assert compared == sum(w.on_grid for w in marked(trained).model.weights)


def test_rows_are_stored_on_the_grid(trained: Path, trained_bundle: pleexport.Bundle) -> None:
    assert trained_bundle.manifest.table_dtype == "int4"
    blob = pleexport.Runner(trained_bundle).blob
    forms = {(s.table, s.dtype, s.group_size, s.scale_dtype) for s in blob.segments}
    assert forms == {
        ("embed_tokens", "int4", 32, "fp32"),  # in the head, as products take it
        ("embed_tokens_per_layer", "int4", 32, "fp16"),
    }
    matched = marked(trained)
    ids = np.arange(100)
    for table, got in blob.lookup(ids).items():
        expected = matched.vectors(matched.model.table(table), ids)
        step = np.abs(expected).max() / 7
        assert np.abs(got - expected).max() < 0.15 * step


def test_it_loses_less_than_larger_blocks(
    trained: Path, trained_bundle: pleexport.Bundle, tmp_path: Path
) -> None:
    other = pleexport.build(
        trained, tmp_path / "bundle", target="android", block_size=256, table_dtype="int4"
    )
    # What is left is what the product itself costs, which rounds activations to 8 bits.
    assert kl(trained_bundle, "dense") < 0.25 * kl(other, "dense")


def test_it_is_the_default_of_every_target(trained: Path) -> None:
    info = pleexport.inspect(trained)
    found = {e.target: (e.table_dtype, e.weight_dtype) for e in info.targets}
    assert found.pop("web") == ("int4", "int8")  # which has one scale for each output
    assert set(found.values()) == {("int4", "int4")}
    assert any("matrices and 2 of 2 tables lie on a grid of 4 bits" in n for n in info.notes)


def test_a_build_says_what_it_found(trained: Path, tmp_path: Path, capsys: Any) -> None:
    options: dict[str, Any] = {"target": "android", "verify": False}
    bundle = pleexport.build(trained, tmp_path / "grid", progress=Progress(), **options)
    assert "lie on a grid of 4 bits in groups of 32" in capsys.readouterr().err
    other = pleexport.build(
        trained, tmp_path / "other", block_size=64, table_dtype="int8", **options
    )
    assert not other.manifest.trained_grid
    assert other.manifest.table_dtype == "int8"
    assert block_size(bundle, "layers.0.self_attn.q_proj.weight") == 32
    assert block_size(other, "layers.0.self_attn.q_proj.weight") == 64
    assert {s.dtype for s in pleexport.Runner(other).blob.segments} == {"int8"}


@pytest.mark.parametrize(
    ("changes", "head", "others"),
    [
        ({}, "int4", "int4"),
        ({"head_dtype": "int8"}, "int8", "int4"),
        ({"trained_grid": False}, "int8", "int4"),
        ({"dtype": "int8", "trained_grid": False}, "int8", "int8"),
        ({"dtype": "fp32"}, "fp32", "fp32"),
    ],
)
def test_what_is_asked_for_comes_first(
    changes: dict[str, Any], head: str, others: str, trained: Path
) -> None:
    request = WeightRequest(**({"dtype": "int4"} | changes))
    weights = {weight.name: weight for weight in marked(trained).model.weights}
    assert request.dtype_of(weights["lm_head.weight"]) == head
    assert request.dtype_of(weights["layers.0.mlp.down_proj.weight"]) == others


@pytest.mark.parametrize("largest", [8, 7, 6, 5])
def test_groups_whose_codes_are_all_small_keep_their_step(largest: int) -> None:
    generator = np.random.default_rng(largest)
    codes = generator.integers(-largest, min(largest, 7) + 1, (64, 64))
    codes[:, ::32] = -largest
    scales = (0.01 * (1 + generator.random((64, 2)))).astype(ml_dtypes.bfloat16)
    steps = scales.astype(np.float32).repeat(32, axis=-1)
    values = (codes * steps).astype(ml_dtypes.bfloat16).astype(np.float32)
    blocks = quantize_blocks(values, bits=4, block_size=32, rounding="grid")
    np.testing.assert_allclose(blocks.scales, scales.astype(np.float32), rtol=2**-8)
    got, half = quantize_rows(values, bits=4, group_size=32, rounding="grid")
    np.testing.assert_array_equal(got, codes)
    assert np.abs(dequantize_rows(got, half, group_size=32) - values).max() < 0.05 * steps.max()


def test_rows_of_zeros_stay_zeros() -> None:
    codes, scales = quantize_rows(
        np.zeros((2, 64), np.float32), bits=4, group_size=32, rounding="grid"
    )
    assert not codes.any()
    assert not scales.view(np.uint16).any()


def test_rows_that_lie_on_no_grid_are_rounded_as_closely_as_others() -> None:
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    errors = {}
    for rounding in ("grid", "searched"):
        stored = quantize_rows(values, bits=4, group_size=32, rounding=rounding)
        difference = dequantize_rows(*stored, group_size=32) - values
        errors[rounding] = np.square(difference).reshape(64, -1, 32).sum(axis=-1)
    assert (errors["grid"] <= errors["searched"] * (1 + 1e-6)).all()


def test_executorch_takes_groups_of_the_grid_and_says_that_it_rounds(trained: Path) -> None:
    model = marked(trained).model
    storage = ExecutorchStorage(WeightRequest("int4"))
    weights = {weight.name: weight for weight in model.weights}
    assert storage.group_of(weights["layers.0.mlp.gate_proj.weight"]) == 32
    assert storage.dtype_of(weights["layers.0.self_attn.k_proj.weight"]) == "int8"
    assert "XNNPACK takes positive ones only" in storage.notes(model)[0]
    assert ExecutorchStorage(WeightRequest("int4", trained_grid=False)).notes(model) == []


def test_numbers_whose_squares_overflow_lie_on_no_grid() -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32) * 1e30
    assert not grid_distance(values) < ON_GRID
