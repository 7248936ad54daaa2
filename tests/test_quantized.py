"""Quantized checkpoints: their own codes, bit for bit, and nothing rounded a second time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import TOLERANCE, check_every_way_to_feed, relative_error
from quantized_checkpoints import E2B_RULES, PLAIN, mobile_gemma4
from safetensors.numpy import load_file, save_file
from transformers import (
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GemmaQuantizationConfig,
)
from transformers.integrations import gemma_quant

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.quantized import read_quantization
from pleexport.codes import unpack_codes
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.families.layers import Parameters
from pleexport.parity.oracle import open_oracle
from pleexport.show.parity import describe_parity

E4B_RULES = E2B_RULES | {
    r"model\.embed_tokens_per_layer$": {"num_bits": 2},
    r"model\.layers\.\d+\.mlp\.": {"num_bits": 4},
}
ODD = {"hidden_size": 36, "intermediate_size": 50, "hidden_size_per_layer_input": 12}
EXACT = {"weight_dtype": "fp32", "table_dtype": "source", "verify": False}
BITS = {"int2": 2, "int4": 4, "int8": 8}


def matched_model(folder: Path) -> MatchedModel:
    checkpoint = Checkpoint(folder)
    return MatchedModel(families.resolve(checkpoint), checkpoint)


@pytest.fixture(scope="session")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint by the rules of the published E2B."""
    return mobile_gemma4(tmp_path_factory.mktemp("mobile") / "checkpoint")


@pytest.fixture(scope="session")
def mobile_bundle(mobile: Path, tmp_path_factory: pytest.TempPathFactory) -> pleexport.Bundle:
    """A bundle with the checkpoint's own codes, verified."""
    return pleexport.build(mobile, tmp_path_factory.mktemp("bundles") / "mobile", target="android")


@pytest.mark.parametrize(
    "changes",
    [{}, {"rules": E4B_RULES}, {"rules": {}}, ODD],
    ids=["E2B's rules", "E4B's rules", "4 bits everywhere", "odd widths"],
)
def test_logits_agree_with_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = mobile_gemma4(tmp_path / "checkpoint", **changes)
    bundle = pleexport.build(folder, tmp_path / "bundle", **EXACT)
    check_every_way_to_feed(bundle, open_oracle(matched_model(folder)).logits)


def test_the_scale_of_a_lookup_is_not_rounded(mobile: Path, tmp_path: Path) -> None:
    table = matched_model(mobile).model.tables[0]
    assert table.multiplier == 32**0.5
    # The control: that of a checkpoint of numbers is.
    config = json.loads((mobile / "config.json").read_text())
    del config["quantization_config"]
    assert families.from_config(config, dtype="bf16").tables[0].multiplier != 32**0.5


def test_codes_go_into_the_graph_bit_for_bit(mobile: Path, mobile_bundle: pleexport.Bundle) -> None:
    tensors = load_file(mobile / "model.safetensors")
    graph = ir.load(mobile_bundle.path / "model.onnx")
    compared = set()
    for node in graph.graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, width = node.attributes["bits"].as_int(), node.attributes["K"].as_int()
        assert len(node.inputs) == 3  # no zero points: the operator's own are those of the format
        name = node.inputs[1].name.removesuffix(".weight.codes")
        if name in PLAIN:
            continue
        module = name if name == "lm_head" else f"model.{name}"
        packed, scales = (node.inputs[i].const_value.numpy() for i in (1, 2))
        codes = packed.reshape(len(packed), -1)
        signed = (
            codes.astype(np.int16) - 128
            if bits == 8
            else unpack_codes(codes, bits=bits, width=8 // bits * codes.shape[1])
        )
        own = tensors[f"{module}.weight"]
        expected = own if bits == 8 else unpack_codes(own, bits=bits, width=width)
        np.testing.assert_array_equal(signed[:, :width], expected)
        assert not signed[:, width:].any()  # what fills up the last block stands for 0
        own_scales = tensors[f"{module}.weight_scale"]
        np.testing.assert_array_equal(scales, np.broadcast_to(own_scales, scales.shape))
        compared.add((name, bits))
    assert {bits for _, bits in compared} == {2, 4, 8}
    assert ("lm_head", 2) in compared
    assert len(compared) == sum(w.codes is not None for w in matched_model(mobile).model.weights)


def test_codes_go_into_rows_bit_for_bit(mobile: Path, mobile_bundle: pleexport.Bundle) -> None:
    blob = pleexport.Runner(mobile_bundle).blob
    assert {s.dtype for s in blob.segments} == {"int2", "int4"}
    assert {s.scale_dtype for s in blob.segments} == {"fp32"}
    tensors = load_file(mobile / "model.safetensors")
    scales = tensors["model.embed_tokens_per_layer.embedding_scale"]
    codes = tensors["model.embed_tokens_per_layer.embedding_quantized"].reshape(120, 6, 4)
    for segment in blob.segments[1:]:
        begin = segment.offset
        stored = blob.stored_rows(np.arange(blob.num_rows))[:, begin : begin + segment.code_bytes]
        np.testing.assert_array_equal(stored, codes[:, segment.layer])
        raw = np.ascontiguousarray(
            blob.stored_rows(np.arange(blob.num_rows))[:, segment.scale_offset : segment.end]
        )
        np.testing.assert_array_equal(raw.view("<f4")[:, 0], scales[:, segment.layer])


def test_a_build_keeps_codes_on_every_target(mobile: Path) -> None:
    info = pleexport.inspect(mobile)
    assert {(e.table_dtype, e.weight_dtype) for e in info.targets} == {("source", "source")}
    assert not any("they are rounded" in note for note in info.notes)


def test_own_codes_stay_close_to_the_original(mobile_bundle: pleexport.Bundle) -> None:
    report = json.loads((mobile_bundle.path / "parity.json").read_text())
    assert report["passed"]
    assert all(check["lossless"] for check in report["tables"])
    by_what = {f["what"]: f["kl"] for f in report["fidelity"]}
    assert by_what["tables"] < 1e-9
    assert by_what["dense"] < 0.05  # inputs of matrices are rounded to 8 bits


def test_sizes_are_those_that_were_planned(mobile: Path, mobile_bundle: pleexport.Bundle) -> None:
    android = next(e for e in pleexport.inspect(mobile).targets if e.target == "android")
    sizes = {record.name: record.size for record in mobile_bundle.manifest.files}
    assert sizes["embeddings.safetensors"] == android.blob_bytes
    assert 0 <= sizes["model.onnx.data"] - android.graph_bytes < 64 * 1000  # alignment


def test_activations_are_rounded_where_the_checkpoint_has_scales(
    mobile_bundle: pleexport.Bundle, tmp_path: Path
) -> None:
    folder = mobile_gemma4(tmp_path / "checkpoint", activations=True)
    bundle = pleexport.build(folder, tmp_path / "bundle", weight_dtype="fp32")
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["passed"]
    assert not report["exact"]  # a step that noise turns over moves a logit by much
    model = matched_model(folder).model
    assert model.rounds_activations
    scales = [w for w in model.weights if w.name.endswith("_activation_scale")]
    assert len(scales) == 2 * sum(w.codes is not None for w in model.weights)
    rounded = [n.op_type for n in ir.load(bundle.path / "model.onnx").graph]
    assert rounded.count("QuantizeLinear") == rounded.count("DequantizeLinear") == len(scales)
    plain = [n.op_type for n in ir.load(mobile_bundle.path / "model.onnx").graph]
    assert "QuantizeLinear" not in plain


def test_rounding_of_activations_can_be_left_out(tmp_path: Path) -> None:
    folder = mobile_gemma4(tmp_path / "checkpoint", activations=True)
    kept, left_out = (
        pleexport.build(
            folder, tmp_path / str(on), weight_dtype="fp32", activation_rounding=on, verify=False
        )
        for on in (True, False)
    )
    assert (kept.manifest.activation_rounding, left_out.manifest.activation_rounding) == (
        True,
        False,
    )
    nodes = [n.op_type for n in ir.load(left_out.path / "model.onnx").graph]
    assert "Round" not in nodes
    report = pleexport.verify(left_out, checkpoint=folder)
    assert report is not None
    by_what = {f.what: f.kl for f in report.fidelity}
    # Nothing else is rounded: all that the dense part costs is what leaving it out changes.
    assert by_what["dense"] == pytest.approx(by_what["activations"], rel=1e-3)
    assert by_what["activations"] > 0.01
    assert "activations not rounded" in describe_parity(report)
    # The control: with the rounding, that line is missing, and the bundle lies close.
    control = pleexport.verify(kept, checkpoint=folder)
    assert control is not None
    costs = {f.what: f.kl for f in control.fidelity}
    assert "activations" not in costs
    assert costs["dense"] < by_what["dense"] / 4
    oracle = open_oracle(matched_model(folder))
    before = oracle.logits([2, 5, 7])
    with oracle.without_activation_rounding():
        np.testing.assert_allclose(
            pleexport.Runner(left_out).logits([2, 5, 7]), oracle.logits([2, 5, 7]), atol=1e-3
        )
    np.testing.assert_array_equal(oracle.logits([2, 5, 7]), before)


def test_leaving_out_changes_nothing_where_nothing_is_rounded(
    mobile: Path, mobile_bundle: pleexport.Bundle, tmp_path: Path
) -> None:
    bundle = pleexport.build(
        mobile, tmp_path / "bundle", target="android", activation_rounding=False, verify=False
    )
    assert bundle.decoder == mobile_bundle.decoder


@pytest.mark.parametrize("scale", [0.5, 0.03, 1e-4])
def test_activations_are_rounded_as_the_original_rounds_them(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        (torch.randn(1, 7, 64, generator=generator), torch.full((1, 7, 1), 2.5 * scale)), -1
    )
    weights = Parameters(
        {"a.weight": torch.eye(65), "a.input_activation_scale": torch.tensor(scale)}
    )
    expected = gemma_quant.apply_srq(x, torch.tensor(scale))
    assert torch.equal(weights.linear("a", x), expected)
    assert not torch.equal(x, expected)
    assert torch.equal(Parameters({"a.weight": torch.eye(65)}).linear("a", x), x)


def test_numbers_are_rounded_anew_where_a_build_asks_for_it(mobile: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(mobile, tmp_path / "bundle", weight_dtype="int8", table_dtype="int8")
    assert bundle.manifest.parity.passed
    assert {s.dtype for s in pleexport.Runner(bundle).blob.segments} == {"int8"}


def test_rules_choose_the_bits_that_transformers_chooses() -> None:
    rules = {
        r"embed": {"num_bits": 8},
        r"layers\.1\.mlp\.": {},
        r"mlp\.down": {"num_bits": 8},
        r"self_attn\.(q|o)_proj": {"num_bits": 2},
        r"^lm_head$": {"num_bits": 8},
        r"proj$": {"num_bits": 4},
    }
    plain = ["layers.3", "o_proj", r"model\.layers\.0\.per_layer.*"]
    own = GemmaQuantizationConfig(
        num_bits=2, module_quant_configs=rules, modules_to_not_convert=plain
    )
    config = Gemma4TextConfig(
        vocab_size=8, vocab_size_per_layer_input=8, hidden_size=8, intermediate_size=8,
        num_hidden_layers=5, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        hidden_size_per_layer_input=4, num_kv_shared_layers=0,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config)
    names = [n for n, m in model.named_modules() if type(m).__name__ == "Linear"]
    gemma_quant.replace_with_quant_layers(model, own, plain)
    fields = {
        "quant_method": "gemma",
        "num_bits": 2,
        "module_quant_configs": rules,
        "modules_to_not_convert": plain,
    }
    quantization = read_quantization({"quantization_config": fields})
    assert quantization is not None
    got = {name: quantization.bits_of(name) for name in names}
    assert got == {name: getattr(model.get_submodule(name), "num_bits", None) for name in names}
    assert set(got.values()) == {None, 2, 4, 8}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"quant_method": "bitsandbytes"}, UnsupportedError, "by `bitsandbytes` are not read"),
        ({"quant_method": "gptq", "bits": 4}, UnsupportedError, "by `gptq` are not read"),
        ({"quant_method": "awq"}, UnsupportedError, "by `awq` are not read"),
        ({"quant_method": "fp8"}, UnsupportedError, "by `fp8` are not read"),
        ({"quant_method": "quanto"}, UnsupportedError, "by `quanto` are not read"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            UnsupportedError,
            r"by `modelopt` \(`NVFP4`\) are not read; those of `gemma` and `compressed-tensors`",
        ),
        ({}, UnsupportedError, "by `None` are not read"),
        ([], CheckpointError, "expected an object"),
        ({"quant_method": "gemma", "num_bits": 3}, UnsupportedError, "`num_bits` is 3"),
        ({"quant_method": "gemma", "num_bits": True}, UnsupportedError, "`num_bits` is True"),
        ({"quant_method": "gemma", "new": 1}, UnsupportedError, "unknown fields `new`"),
        ({"quant_method": "gemma", "module_quant_configs": []}, None, ""),
        (
            {"quant_method": "gemma", "module_quant_configs": [1]},
            CheckpointError,
            "expected an object",
        ),
        (
            {"quant_method": "gemma", "module_quant_configs": {"a": {"group": 2}}},
            UnsupportedError,
            "only `num_bits` is known",
        ),
        (
            {"quant_method": "gemma", "module_quant_configs": {"(": {}}},
            CheckpointError,
            "no regular expression",
        ),
    ],
)
def test_other_forms_are_refused_by_name(
    fields: Any, error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert read_quantization({"quantization_config": fields}) is not None
        return
    with pytest.raises(error, match=message) as caught:
        read_quantization({"quantization_config": fields})
    assert caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("hf_quant_config.json", "ModelOpt"),
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
    ],
)
def test_a_file_beside_the_weights_that_names_a_method_is_believed(
    name: str, method: str, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(gemma4_checkpoint, tmp_path / "changed")
    assert matched_model(tmp_path / "changed")
    (tmp_path / "changed" / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=f"{name}` says .* quantized by {method}, which"):
        matched_model(tmp_path / "changed")


def test_gguf_is_refused_by_name(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(gemma4_checkpoint / "config.json", tmp_path)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(UnsupportedError, match="holds GGUF, which is not read") as caught:
            Checkpoint(path)
        assert "q4_0-unquantized" in str(caught.value.hint)


def test_a_family_that_does_not_read_codes_says_so(
    gemma3n_checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((gemma3n_checkpoint / "config.json").read_text())
    rules = {"quantization_config": {"quant_method": "gemma"}}
    outer = {"model_type": "gemma3n", "dtype": "bfloat16", "text_config": config}
    for changed in (config | rules, outer | rules):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UnsupportedError, match="are quantized already"):
            pleexport.inspect(tmp_path)


def test_codes_of_another_shape_are_named(mobile: Path, tmp_path: Path) -> None:
    config = json.loads((mobile / "config.json").read_text())
    rules = config["quantization_config"]["module_quant_configs"]
    rules["^lm_head$"] = {"num_bits": 4}
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(mobile / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`lm_head.weight` has shape \[120, 8\]; the model"):
        matched_model(folder)


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf, 1e-40, [0.5, 0.5]])
def test_scales_of_activations_that_are_none_are_named(value: Any, tmp_path: Path) -> None:
    folder = mobile_gemma4(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.input_activation_scale"] = np.array(value, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"input_activation_scale` has (value|shape)"
    ) as caught:
        matched_model(folder)
    assert "expected one positive number, or 0 for no rounding" in caught.value.message


class _InSteps(DynamicCache):
    """Keys and values of one layer are rounded to steps, those of the others kept."""

    def __init__(self, config: Any, layer: int, steps: tuple[float, float]) -> None:
        super().__init__(config=config)
        self._layer, self._steps = layer, steps

    def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == self._layer:
            keys, values = (
                gemma_quant.apply_srq(x, torch.tensor(step))
                for x, step in zip((keys, values), self._steps, strict=True)
            )
        return super().update(keys, values, layer_idx, *args, **kwargs)


def with_cache_scales(folder: Path, layer: int, steps: tuple[float, float]) -> Path:
    mobile_gemma4(folder)
    tensors = load_file(folder / "model.safetensors")
    for side, step in zip("kv", steps, strict=True):
        name = f"model.layers.{layer}.self_attn.{side}_cache_scale"
        tensors[name] = np.array(step, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_int8_cache_takes_the_scales_of_the_checkpoint(tmp_path: Path) -> None:
    # The largest keys are cut off.
    layer, steps, ids = 2, (0.012, 0.05), list(range(40))
    folder = with_cache_scales(tmp_path / "checkpoint", layer, steps)
    original = open_oracle(matched_model(folder))._model
    cache = _InSteps(original.config, layer, steps)
    with torch.no_grad():
        found = original(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    expected = found.logits[0].numpy()

    bundle = pleexport.build(folder, tmp_path / "bundle", cache_dtype="int8", **EXACT)
    assert relative_error(expected, pleexport.Runner(bundle).logits(ids)) < TOLERANCE
    # The control: transformers by itself leaves these scales alone.
    unrounded = open_oracle(matched_model(folder)).logits(ids)
    assert relative_error(expected, unrounded) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("layer", "steps", "dtype", "used"),
    [
        (2, (0.1, 0.1), "int8", ["key", "value"]),
        (2, (0.1, 0.0), "int8", ["key"]),
        (2, (0.1, 0.1), "fp16", []),
    ],
)
def test_scales_of_a_cache_are_used_where_one_is_in_8_bits(
    layer: int, steps: tuple[float, float], dtype: Any, used: list[str], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(with_cache_scales(tmp_path / "checkpoint", layer, steps))
    matched = MatchedModel(families.resolve(checkpoint).with_cache(dtype), checkpoint)
    found = [w for w in matched.model.weights if w.name.endswith("_cache_step")]
    assert [w.name for w in found] == [f"layers.{layer}.{side}_cache_step" for side in used]
    # Exactly: the dtype of the checkpoint, bf16, holds other numbers.
    assert [matched.values(w).item() for w in found] == [np.float32(0.1)] * len(used)
