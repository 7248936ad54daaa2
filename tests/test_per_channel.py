"""Weights in integers with one scale for each output, as WebAssembly multiplies them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import original_of, relative_error
from numpy.typing import NDArray
from quantized_checkpoints import mobile_gemma4
from safetensors.torch import load_file

import pleexport
from pleexport import families
from pleexport.backends.onnx.channels import channel_codes, channel_scales
from pleexport.backends.onnx.storage import PANEL, OnnxStorage
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.codes import unpack_codes
from pleexport.errors import TargetError
from pleexport.export.options import resolve
from pleexport.export.plan import make_plan
from pleexport.parity.metrics import mean_kl
from pleexport.targets import load
from pleexport.weights import WeightRequest

IDS = [2, *range(40, 80)]


@pytest.fixture(scope="module")
def bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> pleexport.Bundle:
    """A bundle for the web whose rows are exact."""
    out = tmp_path_factory.mktemp("bundles") / "web"
    return pleexport.build(gemma4_checkpoint, out, target="web", table_dtype="source", verify=False)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint, some of whose matrices round their inputs."""
    return mobile_gemma4(tmp_path_factory.mktemp("mobile") / "checkpoint", activations=True)


def products(bundle: pleexport.Bundle) -> list[ir.Node]:
    graph = ir.load(bundle.path / "model.onnx").graph
    assert not [node for node in graph if node.op_type in ("MatMulNBits", "DynamicQuantizeMatMul")]
    return [node for node in graph if node.op_type == "MatMulInteger"]


def stored(node: ir.Node) -> tuple[str, NDArray[Any]]:
    """Name of a matrix, and its codes `[K, N]` without the zero point."""
    value = node.inputs[1]
    if value.producer() is not None:
        value = value.producer().inputs[0]
    panels = np.asarray(value.const_value.numpy()).astype(np.int16)
    codes = whole(panels - node.inputs[3].const_value.numpy())
    name = value.name.removesuffix(".codes")
    outputs = node.graph.initializers[f"{name}.scales"].shape[0]
    assert len(panels) == -(-outputs // PANEL)
    assert not codes[:, outputs:].any()
    return name, codes[:, :outputs]


def whole(panels: NDArray[Any]) -> NDArray[Any]:
    """Codes `[K, N]` of those of `[panels, K, PANEL]`."""
    return panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)


def test_every_matrix_is_in_int8_with_one_scale_for_each_output(
    bundle: pleexport.Bundle, gemma4_checkpoint: Path
) -> None:
    own = load_file(gemma4_checkpoint / "model.safetensors")
    model = families.resolve(Checkpoint(gemma4_checkpoint))
    names = {w.name: w for w in model.weights if w.precision != "full"}
    scales = {v.name: v for v in ir.load(bundle.path / "model.onnx").graph.initializers.values()}
    for node in products(bundle):
        name, codes = stored(node)
        key = names.pop(name).source_key
        weight = own[key if key in own else f"model.{key}"].float().numpy()
        of_outputs = scales[f"{name}.scales"].const_value.numpy()
        assert np.abs(codes).max() <= 127
        # Within half a step of the scale that clips nothing, and no worse than it in squares.
        widest = np.abs(weight).max(axis=1) / 127
        error = ((codes * of_outputs).T - weight) ** 2
        plain = (np.rint(weight / widest[:, None]) * widest[:, None] - weight) ** 2
        assert (error.sum(axis=1) <= plain.sum(axis=1) * 1.0001).all()
    assert not names
    assert bundle.manifest.per_channel


def test_a_bundle_stays_close_to_the_original(
    bundle: pleexport.Bundle, gemma4_checkpoint: Path
) -> None:
    want = original_of(gemma4_checkpoint).logits(IDS)
    assert 1e-9 < mean_kl(want, got=pleexport.Runner(bundle).logits(IDS)) < 2e-3


def test_a_loud_token_leaves_its_neighbours_alone(bundle: pleexport.Bundle) -> None:
    runner = pleexport.Runner(bundle)
    together = runner.logits(IDS)
    runner.reset()
    apart = np.concatenate([runner.feed([token]) for token in IDS])
    # One scale for a whole call would move them by hundredths of the range.
    assert relative_error(apart, together) < 1e-5


def test_a_graph_has_no_casts(bundle: pleexport.Bundle) -> None:
    # A browser would compile a function of 490 kB anew: `AvoidCasts`.
    kinds = {node.op_type for node in ir.load(bundle.path / "model.onnx").graph.all_nodes()}
    assert "MatMulInteger" in kinds
    assert not kinds & {"Cast", "CastLike"}


def test_an_input_of_several_products_is_rounded_once(bundle: pleexport.Bundle) -> None:
    nodes = products(bundle)
    rounded = {node.inputs[0] for node in nodes}
    assert len(rounded) < 0.8 * len(nodes)
    assert {value.producer().op_type for value in rounded} == {"QuantizeLinear"}


def test_codes_of_a_checkpoint_are_kept_in_4_bits_and_8(mobile: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(mobile, tmp_path / "bundle", target="web", verify=False)
    tensors, kept = load_file(mobile / "model.safetensors"), set()
    by_name = {w.name: w for w in families.resolve(Checkpoint(mobile)).weights}
    for node in products(bundle):
        name, codes = stored(node)
        weight = by_name[name]
        if weight.codes is None:
            continue
        module = name.removesuffix(".weight")
        module = module if module == "lm_head" else f"model.{module}"
        own, bits = tensors[f"{module}.weight"].numpy(), int(weight.codes.dtype[3:])
        expected = own if bits == 8 else unpack_codes(own, bits=bits, width=weight.shape[1])
        np.testing.assert_array_equal(codes.T, expected)
        in_4_bits = node.inputs[1].producer() is not None
        kept.add((bits, in_4_bits))
    assert kept == {(2, True), (4, True), (8, False)}


def test_an_activation_that_the_original_rounds_is_not_rounded_again(
    mobile: Path, tmp_path: Path
) -> None:
    bundle = pleexport.build(mobile, tmp_path / "bundle", target="web", verify=False)
    own = {
        float(tensor.bfloat16())
        for name, tensor in load_file(mobile / "model.safetensors").items()
        if name.endswith("input_activation_scale") and float(tensor)
    }
    steps = [node.inputs[0].producer().inputs[1].const_value.numpy() for node in products(bundle)]
    assert {float(step) for step in steps} - {1.0} == own


def test_blocks_can_be_asked_for(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(
        gemma4_checkpoint, tmp_path / "bundle", target="web", block_size=32, verify=False
    )
    graph = ir.load(bundle.path / "model.onnx").graph
    assert {"MatMulNBits"} == {n.op_type for n in graph if "MatMul" in n.op_type and n.domain}
    assert not bundle.manifest.per_channel


def test_sizes_are_known_before_the_build(
    bundle: pleexport.Bundle, mobile: Path, tmp_path: Path
) -> None:
    quantized = pleexport.build(mobile, tmp_path / "bundle", target="web", verify=False)
    for built in (bundle, quantized):
        data = built.path / "model.onnx.data"
        tensors = ir.load(built.path / "model.onnx").graph.initializers.values()
        held = sum(
            v.const_value.nbytes for v in tensors if isinstance(v.const_value, ir.ExternalTensor)
        )
        # Tensors begin at pages, or at lines of the cache.
        assert held <= data.stat().st_size < held + 4096 * len(tensors)
    checkpoint = Checkpoint(mobile)
    plan = make_plan(
        families.resolve(checkpoint), resolve({"target": "web"}, quantized=True), source="bf16"
    )
    assert plan.sizes["model.onnx.data"] == pytest.approx(
        (quantized.path / "model.onnx.data").stat().st_size, rel=0.2
    )


def test_zero_points_are_refused(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="one scale for each output and no zero points"):
        pleexport.build(gemma4_checkpoint, tmp_path / "bundle", target="web", symmetric=False)


def test_groups_of_a_checkpoint_are_rounded_and_told(mobile: Path) -> None:
    model = families.resolve(Checkpoint(mobile))
    storage = OnnxStorage(WeightRequest("source", per_channel=True))
    assert storage.notes(model) == []
    one = next(w for w in model.weights if w.codes and w.codes.dtype == "int4")
    assert one.codes is not None
    assert (storage.keeps_codes(one), storage.dtype_of(one)) == (True, "int4")
    grouped = replace(one, codes=replace(one.codes, group_size=16))
    assert (storage.keeps_codes(grouped), storage.dtype_of(grouped)) == (False, "int8")
    changed = replace(model, weights=(grouped,))
    (note,) = storage.notes(changed)
    assert note.startswith("1 matrices whose codes have several scales for an output are rounded")
    blocks = OnnxStorage(WeightRequest("source"))
    assert blocks.keeps_codes(grouped)
    assert blocks.notes(changed) == []


def test_a_target_says_so() -> None:
    assert load("web").per_channel
    assert not load("android").per_channel


@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_scales_leave_no_more_error_than_the_widest(outlier: float) -> None:
    values = np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32)
    values[0, 0] *= outlier
    values[3] = 0
    scales = channel_scales(values)
    codes = whole(channel_codes(values, scales)).astype(np.float32)[:, : len(values)]
    back = (codes - 128).T * scales[:, None]
    widest = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - values) <= widest * 1.01).all()
    assert (back[3] == 0).all()


def test_fewer_bits_than_8_are_not_rounded_to(mobile: Path) -> None:
    weight = next(w for w in families.resolve(Checkpoint(mobile)).weights if w.codes)
    asked = WeightRequest("int4", per_channel=True)
    assert OnnxStorage(asked).dtype_of(weight) == "int8"
