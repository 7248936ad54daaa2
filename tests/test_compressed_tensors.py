"""Checkpoints that compressed-tensors has packed: its groups, its codes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from conftest import check_every_way_to_feed, relative_error
from packed_checkpoints import W4A16, WIDE, packed_gemma4, weights

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.quantized import read_quantization
from pleexport.codes import unpack_codes
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.export.blob_writer import write_blob
from pleexport.export.notes import notes_on_codes
from pleexport.export.options import BuildOptions, resolve
from pleexport.export.plan import make_plan
from pleexport.model import Weight
from pleexport.parity.oracle import open_oracle
from pleexport.runtime.blob import Blob

STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
# Everything at once: 2, 4 and 8 bits, groups and rows, zero points, tables and an untied head.
MIXED: dict[str, Any] = {
    "wide": {"targets": ["re:.*mlp.*"], "weights": weights(2, None)},
    "attention": {"targets": ["re:.*self_attn.*"], "weights": weights(4, 16, symmetric=False)},
    "rest": {"targets": ["Linear"], "weights": weights(8, 32, symmetric=False)},
    "head": {"targets": ["lm_head"], "weights": weights(2, 32, symmetric=False)},
    "main": {"targets": ["model.embed_tokens"], "weights": weights(8, None)},
    "rows": {"targets": ["Embedding"], "weights": weights(4, 16)},
}
MIXED_CHANGES = {"groups": MIXED, "ignore": [], "tie_word_embeddings": False}


def matched_model(folder: Path) -> MatchedModel:
    checkpoint = Checkpoint(folder)
    return MatchedModel(families.resolve(checkpoint), checkpoint)


def as_rounded(groups: dict[str, Any]) -> dict[str, Any]:
    """The same groups, with inputs and outputs of matrices rounded to 8 bits."""
    rounding = {"input_activations": STATIC, "output_activations": STATIC}
    return {name: group | rounding for name, group in groups.items()}


def witness(folder: Path) -> Any:
    """The original as compressed-tensors unpacks it, widened to float32.

    Scales are widened first: what is unpacked takes their dtype. `from_pretrained` loads neither
    quantized tables nor zero points of this package yet.
    """
    fields = json.loads((folder / "config.json").read_text())
    rules = QuantizationConfig(**fields.pop("quantization_config"))
    # As `from_pretrained` makes one: `to` would round rotary frequencies too.
    torch.set_default_dtype(getattr(torch, fields["dtype"]))
    try:
        model = Gemma4ForCausalLM(Gemma4TextConfig(**fields))
    finally:
        torch.set_default_dtype(torch.float32)
    apply_quantization_config(model, rules, show_progress=False)
    compressor = ModelCompressor(quantization_config=rules)
    compressor.compress_model(model)
    missing, unexpected = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    # A copy of the multiplier, which the package adds to modules that it has packed.
    left = {name for name in (*missing, *unexpected) if not name.endswith(".embed_scale")}
    assert left <= {"lm_head.weight"}
    model = nn.Module.float(model).eval()
    compressor.decompress_model(model)
    return model


def witness_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return logits


@pytest.fixture(scope="session")
def w4a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention and feed-forward parts in int4, groups of 32; everything else bf16."""
    return packed_gemma4(tmp_path_factory.mktemp("w4a16") / "checkpoint")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_gemma4(tmp_path_factory.mktemp("mixed") / "checkpoint", **MIXED_CHANGES)


@pytest.fixture(scope="session")
def mixed_bundle(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> pleexport.Bundle:
    """A bundle with the checkpoint's own codes, verified."""
    return pleexport.build(mixed, tmp_path_factory.mktemp("bundles") / "mixed", target="android")


def unpacked(folder: Path, module: str, bits: int) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points of a module, as the package unpacks them."""
    tensors = load_file(folder / "model.safetensors")
    shape = tensors[f"{module}.weight_shape"].tolist()
    found = {"codes": unpack_from_int32(tensors[f"{module}.weight_packed"], bits, shape)}
    found["scales"] = tensors[f"{module}.weight_scale"].float()
    packed = tensors.get(f"{module}.weight_zero_point")
    if packed is not None:
        of_groups = torch.Size((shape[0], found["scales"].shape[1]))
        found["zero_points"] = unpack_from_int32(packed, bits, of_groups, packed_dim=0)
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_those_of_the_package(
    bits: int, group_size: int | None, symmetric: bool, tmp_path: Path
) -> None:
    how = weights(bits, group_size, symmetric=symmetric)
    dtype = {2: torch.bfloat16, 4: torch.float16, 8: torch.float32}[bits]
    groups = {"all": {"targets": ["Linear", "Embedding"], "weights": how}}
    folder = packed_gemma4(
        tmp_path / "checkpoint",
        groups=groups,
        ignore=["re:.*per_layer_projection"],
        dtype=dtype,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        tie_word_embeddings=False,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**how))
    matched, tensors = matched_model(folder), load_file(folder / "model.safetensors")
    compared = 0
    items = [(w, w.source_key) for w in matched.model.weights if w.codes]
    items += [(t, t.keys[0]) for t in matched.model.tables]
    for item, key in items:
        assert item.codes
        full = key if key == "lm_head.weight" else f"model.{key}"
        stem = full.removesuffix("weight")
        own = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        own["weight_scale"] = own["weight_scale"].float()
        expected = PackedQuantizationCompressor.decompress(own, scheme)["weight"].numpy()
        if isinstance(item, Weight):
            got = matched.values(item)
            part = matched.read(item, slice(3, 7), slice(4, 41))
            np.testing.assert_array_equal(part, expected[3:7, 4:41])
        else:
            got = matched.row_values(item, slice(None))
            ids = np.array([5, 117, 5])
            np.testing.assert_array_equal(matched.row_values(item, ids), expected[ids])
        np.testing.assert_array_equal(got, expected)
        compared += 1
    assert compared == 2 * 7 + 2 + 1 + 1 + 2


@pytest.mark.parametrize("name", ["w4a16", "mixed"])
def test_logits_agree_with_transformers(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    bundle = pleexport.build(
        folder, tmp_path / "bundle", weight_dtype="fp32", table_dtype="source", verify=False
    )
    original = witness(folder)
    if name == "w4a16":
        original = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        original = nn.Module.float(original).eval()
    check_every_way_to_feed(bundle, lambda ids: witness_logits(original, ids))


@pytest.mark.parametrize("rounded", [False, True])
def test_the_original_is_that_of_the_package(rounded: bool, tmp_path: Path) -> None:
    changes = dict(MIXED_CHANGES)
    if rounded:
        groups = as_rounded({n: MIXED[n] for n in ("wide", "attention", "rest")})
        # The package stores codes with rounded activations as bytes, unless it is told otherwise.
        changes["groups"] = {n: g | {"format": "pack-quantized"} for n, g in groups.items()}
        changes["groups"]["rest"]["format"] = "int-quantized"
        changes["ignore"] = ["re:.*embed_tokens.*"]
    folder = packed_gemma4(tmp_path / "checkpoint", **changes)
    matched, ids = matched_model(folder), list(range(60, 100))
    expected = witness_logits(witness(folder), ids)
    # A step that noise turns over moves a logit by much; here none does.
    assert relative_error(expected, open_oracle(matched).logits(ids)) < 1e-5
    assert matched.model.rounds_activations == rounded
    if rounded:
        dtypes = {e.dtype for w in matched.model.weights if w.codes for e in matched.entries(w)}
        assert dtypes == {"int32", "int8", "bf16"}


def test_codes_go_into_the_graph_bit_for_bit(mixed: Path, mixed_bundle: pleexport.Bundle) -> None:
    graph = ir.load(mixed_bundle.path / "model.onnx")
    compared = set()
    for node in graph.graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, width = node.attributes["bits"].as_int(), node.attributes["K"].as_int()
        block_size = node.attributes["block_size"].as_int()
        name = node.inputs[1].name.removesuffix(".weight.codes")
        own = unpacked(mixed, name if name == "lm_head" else f"model.{name}", bits)
        stored = [value.const_value.numpy() for value in node.inputs[1:]]
        codes = stored[0].reshape(len(stored[0]), -1)
        if bits == 8:
            signed = codes.astype(np.int16) - 128
        else:
            signed = unpack_codes(codes, bits=bits, width=8 // bits * codes.shape[1])
        np.testing.assert_array_equal(signed[:, :width], own["codes"])
        groups = own["scales"].shape[1]
        of_block = np.arange(stored[1].shape[1]) * block_size // (width // groups)
        np.testing.assert_array_equal(stored[1], own["scales"].numpy()[:, of_block])
        if "zero_points" in own:
            zero_points = unpack_zero_points(stored[2], bits)[:, : len(of_block)]
            np.testing.assert_array_equal(zero_points, own["zero_points"].numpy()[:, of_block])
        assert len(stored) == 2 + ("zero_points" in own)
        compared.add((name, bits, groups > 1, "zero_points" in own))
    kinds = {kind[1:] for kind in compared}
    assert kinds >= {(2, False, False), (4, True, True), (8, True, True), (2, True, True)}
    assert len(compared) == sum(w.codes is not None for w in matched_model(mixed).model.weights)


def unpack_zero_points(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    if bits == 8:
        return packed.astype(np.int16) - 128
    return unpack_codes(packed, bits=bits, width=8 // bits * packed.shape[1]).astype(np.int16)


def test_codes_go_into_rows_bit_for_bit(mixed: Path, mixed_bundle: pleexport.Bundle) -> None:
    blob = pleexport.Runner(mixed_bundle).blob
    for table, bits, name in (("embed_tokens", 8, None), ("embed_tokens_per_layer", 4, 0)):
        own = unpacked(mixed, f"model.{table}", bits)
        segments = [s for s in blob.segments if s.table == table]
        assert {(s.dtype, s.scale_dtype) for s in segments} == {(f"int{bits}", "fp32")}
        codes, scales = [], []
        for segment in segments:
            raw = blob.stored_rows(np.arange(blob.num_rows))[
                :, segment.offset : segment.offset + segment.code_bytes
            ]
            codes.append(unpack_codes(np.ascontiguousarray(raw), bits=bits, width=segment.width))
            raw = np.ascontiguousarray(
                blob.stored_rows(np.arange(blob.num_rows))[:, segment.scale_offset : segment.end]
            )
            scales.append(raw.view("<f4"))
        np.testing.assert_array_equal(np.concatenate(codes, axis=1), own["codes"])
        np.testing.assert_array_equal(np.concatenate(scales, axis=1), own["scales"])
        assert segments[0].layer == name


def test_own_codes_stay_close_to_the_original(mixed_bundle: pleexport.Bundle) -> None:
    report = json.loads((mixed_bundle.path / "parity.json").read_text())
    assert report["passed"]
    assert all(check["lossless"] for check in report["tables"])
    by_what = {f["what"]: f["kl"] for f in report["fidelity"]}
    assert by_what["tables"] < 1e-9
    assert by_what["dense"] < 0.05  # inputs of matrices are rounded to 8 bits


def test_rows_without_a_place_for_zero_points_are_numbers(tmp_path: Path) -> None:
    groups = {"rows": {"targets": ["Embedding"], "weights": weights(4, 16, symmetric=False)}}
    folder = packed_gemma4(
        tmp_path / "checkpoint", groups=groups, ignore=[], tie_word_embeddings=False
    )
    matched, plan = matched_model(folder), plan_of(folder)
    write_blob(matched, tmp_path / "blob", segments=plan.segments, page_size=16384)
    blob = Blob(tmp_path / "blob")
    assert {s.dtype for s in blob.segments} == {"fp32"}
    assert "are stored as wide" in notes_on_codes(plan)[-1]
    ids = np.arange(120)
    for table in matched.model.tables:
        np.testing.assert_array_equal(blob.lookup(ids)[table.name], matched.vectors(table, ids))


def test_a_multimodal_checkpoint_is_the_same_model(w4a16: Path, tmp_path: Path) -> None:
    def moved(name: str) -> str:
        return name.replace("model.", "model.language_model.", 1)

    tensors = {moved(name): t for name, t in load_file(w4a16 / "model.safetensors").items()}
    tower = "model.vision_tower.layer.weight"
    tensors |= {f"{tower}_packed": torch.zeros(4, 4, dtype=torch.int32)}
    tensors |= {f"{tower}_scale": torch.ones(4, 1, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((w4a16 / "config.json").read_text())
    quantization = text.pop("quantization_config")
    quantization["ignore"] = [moved(name) for name in quantization["ignore"]]
    config = {"model_type": "gemma4", "dtype": "bfloat16", "text_config": text}
    config |= {"tie_word_embeddings": True, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = list(range(40))
    expected = open_oracle(matched_model(w4a16)).logits(ids)
    assert np.array_equal(open_oracle(matched_model(tmp_path)).logits(ids), expected)


def test_groups_choose_what_the_package_chooses() -> None:
    schemes = {
        "named": {"targets": ["model.layers.1.mlp.up_proj", "lm_head"], "weights": weights(8)},
        "patterns": {
            "targets": ["re:.*mlp.*", r"re:model\.layers\.[02]\..*down_proj", "re:layers.*"],
            "weights": weights(2),
        },
        "later": {"targets": ["re:.*up_proj", "re:model.layers.2.*"], "weights": weights(8)},
        "classes": {"targets": ["Linear"], "weights": weights(4)},
        "rows": {"targets": ["Embedding"], "weights": weights(8)},
        "left": {"targets": ["re:.*q_proj"], "weights": None},
    }
    ignore = ["re:.*k_proj", "model.layers.0.self_attn.o_proj", "layers.1.self_attn.v_proj"]
    sizes = {"num_hidden_layers": 3, "num_kv_shared_layers": 0, "num_attention_heads": 2}
    config = Gemma4TextConfig(
        vocab_size=8, vocab_size_per_layer_input=8, num_key_value_heads=1,
        **(WIDE | sizes),
    )  # fmt: skip
    model = Gemma4ForCausalLM(config)
    fields: dict[str, Any] = {"config_groups": schemes, "ignore": ignore}
    fields["format"] = "pack-quantized"
    apply_quantization_config(model, QuantizationConfig(**fields), show_progress=False)
    own = read_quantization(
        {"quantization_config": fields | {"quant_method": "compressed-tensors"}}
    )
    assert own is not None
    got, expected = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found = own.matrix(name, Weight("x.weight", (32, 32)))
        elif isinstance(module, nn.Embedding):
            found = own.table(name, families.from_config(config_of(model), dtype="fp32").tables[0])
        else:
            continue
        got[name] = found and int(found.dtype.removeprefix("int"))
        scheme = getattr(module, "quantization_scheme", None)
        expected[name] = scheme.weights.num_bits if scheme and scheme.weights else None
    assert got == expected
    assert set(got.values()) == {None, 2, 4, 8}


def config_of(model: Any) -> dict[str, Any]:
    fields: dict[str, Any] = model.config.to_dict()
    return fields


GROUP = W4A16["group_0"]


def quantization(**changes: Any) -> dict[str, Any]:
    fields = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {"quantization_config": fields | {"config_groups": W4A16} | changes}


def one_group(**changes: Any) -> dict[str, Any]:
    return quantization(config_groups={"group_0": GROUP | changes})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (quantization(format="nvfp4-pack-quantized"), UnsupportedError, "`nvfp4-pack-quantized`"),
        (quantization(format="float-quantized"), UnsupportedError, "format `float-quantized`"),
        (quantization(format="marlin-24"), UnsupportedError, "format `marlin-24`"),
        (quantization(format="dense"), UnsupportedError, "format `dense`"),
        (quantization(format="mixed-precision"), UnsupportedError, "format `mixed-precision`"),
        (one_group(format="mxfp4-pack-quantized"), UnsupportedError, "`mxfp4-pack-quantized`"),
        (quantization(format="int-quantized"), UnsupportedError, "codes of 4 bits as `int-q"),
        (quantization(quantization_status="frozen"), UnsupportedError, "is 'frozen'; only `comp"),
        (
            quantization(sparsity_config={"format": "sparse-24-bitmask"}),
            UnsupportedError,
            "`sparsity_config` of compressed-tensors, 'sparse-24-bitmask', is not read",
        ),
        (
            quantization(transform_config={"config_groups": {"R1": {}}}),
            UnsupportedError,
            "`transform_config` of compressed-tensors",
        ),
        (quantization(new=1), UnsupportedError, "unknown fields `new`"),
        (
            quantization(config_groups=None),
            CheckpointError,
            "`config_groups` is None and",
        ),
        (
            quantization(ignore=[1]),
            CheckpointError,
            r"`ignore` \[1\]; expected an object",
        ),
        (quantization(config_groups={"W4A16": ["Linear"]}), CheckpointError, "`W4A16` is"),
        (quantization(ignore=["re:("]), CheckpointError, "no regular expression"),
        (one_group(new=1), UnsupportedError, "group `group_0`: unknown fields `new`"),
        (one_group(weights=[]), CheckpointError, r"`weights` is \[\]"),
        (one_group(weights=weights(3)), UnsupportedError, "`num_bits` is 3"),
        (one_group(weights=weights(type="float")), UnsupportedError, "of type 'float'"),
        (one_group(weights=weights(dynamic=True)), UnsupportedError, "`dynamic` True"),
        (one_group(weights=weights(strategy="tensor")), UnsupportedError, "strategy 'tensor'"),
        (one_group(weights=weights(group_size=24)), UnsupportedError, "`group_size` is 24"),
        (one_group(weights=weights(actorder="new")), UnsupportedError, "`actorder` 'new'"),
        (
            one_group(input_activations=STATIC | {"dynamic": True, "strategy": "token"}),
            UnsupportedError,
            "`input_activations` with .* `dynamic` True is not implemented",
        ),
        (one_group(output_activations=4), CheckpointError, "`output_activations` is 4"),
        (
            one_group(weights=None, input_activations=STATIC),
            UnsupportedError,
            "matrices that hold numbers",
        ),
        (
            quantization(kv_cache_scheme=STATIC | {"type": "float"}),
            UnsupportedError,
            "`kv_cache_scheme` with .*'float'",
        ),
    ],
)
def test_other_forms_are_refused_by_name(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read_quantization(config)
    assert caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "config",
    [
        quantization(),
        quantization(kv_cache_scheme=STATIC, sparsity_config={}, version="0.9.4"),
        one_group(format="pack-quantized"),
        one_group(weights={"num_bits": 8, "group_size": -1, "actorder": "static"}),
        one_group(weights={"num_bits": 8, "group_size": 64}, input_activations=STATIC),
        one_group(weights=None),
    ],
)  # fmt: skip
def test_forms_that_mean_the_same_are_read(config: dict[str, Any]) -> None:
    assert read_quantization(config) is not None


def test_groups_that_a_model_cannot_have_are_named(w4a16: Path) -> None:
    config = json.loads((w4a16 / "config.json").read_text())
    for groups, error, message in (
        (W4A16 | {"b": {"targets": ["re:.*mlp"], "weights": weights(4, 80)}}, CheckpointError,
         "groups of 80 for `model.layers.0.mlp.gate_proj`, whose rows have 64 weights"),
        ({"b": {"targets": ["Embedding"], "weights": weights(4, 48)}}, UnsupportedError,
         "groups of 48 for `model.embed_tokens_per_layer`, which cross its vectors of 32"),
        (as_rounded({"b": {"targets": ["Embedding"], "weights": weights(4, 32)}}),
         UnsupportedError, "rounds what `model.embed_tokens` looks up"),
    ):  # fmt: skip
        rules = config["quantization_config"] | {"config_groups": groups}
        changed = config | {
            "quantization_config": rules,
            "hidden_size": 96 if "48" in message else 64,
        }
        with pytest.raises(error, match=message):
            resolved(w4a16, changed)


def resolved(folder: Path, config: dict[str, Any]) -> Any:
    checkpoint = Checkpoint(folder)
    checkpoint.config = config
    return families.resolve(checkpoint)


def changed_checkpoint(folder: Path, to: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of which some tensors of one matrix are others, or gone."""
    shutil.copytree(folder, to)
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        key = f"model.layers.0.self_attn.q_proj.{name}"
        found.pop(key, None)
        if tensor is not None:
            found[key] = tensor
    save_file(found, to / "model.safetensors")
    return to


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight_scale": None}, "`model.layers.0.self_attn.q_proj.weight_scale` is missing"),
        ({"weight_shape": None}, "q_proj.weight_shape` is missing"),
        ({"weight_zero_point": None}, "q_proj.weight_zero_point` is missing"),
        (
            {"weight_shape": torch.tensor([32, 60])},
            r"gives shape \[32, 60\]; the model has \[64, 64\]",
        ),
        ({"weight_shape": torch.tensor([32])}, r"weight_shape` has shape \[1\]"),
        ({"weight_scale": torch.ones(32, 2)}, r"has shape \[32, 2\]; the model has \[64, 4\]"),
        ({"weight_scale": torch.ones(64, 4).int()}, "weight_scale` has dtype int32; expected"),
        (
            {"weight_packed": torch.zeros(64, 7, dtype=torch.int32)},
            r"weight_packed` has shape \[64, 7\]; the model has \[64, 8\]",
        ),
        (
            {"weight_packed": torch.zeros(64, 8, dtype=torch.int64)},
            "weight_packed` has dtype int64; expected one of int32",
        ),
        (
            {"weight_zero_point": torch.zeros(64, 4, dtype=torch.int8)},
            r"weight_zero_point` has shape \[64, 4\]; the model has \[8, 4\]",
        ),
        ({"weight": torch.zeros(32, 64)}, "q_proj.weight` is used by nothing"),
        ({"input_scale": torch.ones(1)}, "q_proj.input_scale` is used by nothing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tensors: dict[str, Any], message: str, mixed: Path, tmp_path: Path
) -> None:
    folder = changed_checkpoint(mixed, tmp_path / "changed", **tensors)
    with pytest.raises(CheckpointError, match=message):
        matched_model(folder)


def test_inputs_in_another_order_are_refused(w4a16: Path, tmp_path: Path) -> None:
    in_order = torch.arange(64, dtype=torch.int32) // 32
    for name, order in (("a", in_order), ("b", torch.full_like(in_order, -1))):
        folder = changed_checkpoint(w4a16, tmp_path / name, weight_g_idx=order)
        assert matched_model(folder)
    folder = changed_checkpoint(w4a16, tmp_path / "c", weight_g_idx=in_order.flip(0))
    with pytest.raises(UnsupportedError, match=r"q_proj.weight_g_idx` puts inputs into another"):
        matched_model(folder)


def test_tensors_that_nothing_is_computed_with_are_passed_over(w4a16: Path, tmp_path: Path) -> None:
    folder = changed_checkpoint(w4a16, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    # The cache of layer 0 is of a window, that of layer 2 of the whole context.
    extra = {f"model.layers.{i}.self_attn.k_scale": torch.full((1,), 0.5) for i in (0, 2)}
    for name in ("weight_packed", "weight_scale", "weight_shape"):  # layer 5 shares another's
        extra[f"model.layers.5.self_attn.k_proj.{name}"] = torch.ones(2)
    save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_scale` is used by nothing"):
        matched_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = STATIC
    (folder / "config.json").write_text(json.dumps(config))
    (step,) = [w for w in matched_model(folder).model.weights if w.name.endswith("_cache_step")]
    assert matched_model(folder).values(step).tolist() == 0.5
    assert set(matched_model(folder).ignored) == extra.keys() - {f"model.{step.source_key}"}
    checkpoint = Checkpoint(folder)
    without = MatchedModel(families.resolve(checkpoint).with_cache("fp32"), checkpoint)
    assert set(without.ignored) == extra.keys()


def plan_of(folder: Path, **options: Any) -> Any:
    matched = matched_model(folder)
    settings = resolve(BuildOptions(**options), quantized=True)
    return make_plan(matched.model, settings, source=matched.dtype)


def test_what_is_rounded_and_what_is_rounded_again_is_said(w4a16: Path, mixed: Path) -> None:
    matrices, tables = notes_on_codes(plan_of(w4a16))
    assert matrices.startswith(
        "14 matrices that the checkpoint holds in numbers are rounded to int8"
    )
    assert "`--weight-dtype fp32` rounds nothing" in matrices
    assert "tables of 61.44 kB are stored as wide as the checkpoint has them" in tables
    kept = notes_on_codes(plan_of(w4a16, head_dtype="fp32", table_dtype="int8"))
    assert [note.split(" that")[0] for note in kept] == ["13 matrices"]
    assert notes_on_codes(plan_of(mixed)) == []
    assert notes_on_codes(plan_of(mixed, weight_dtype="fp32", table_dtype="fp32")) == []
    again = notes_on_codes(plan_of(mixed, weight_dtype="int8", table_dtype="int8"))
    assert "codes (int2, int4, int8) to int8, which loses" in again[0]
    assert "table `embed_tokens` is rounded a second time" in again[1]
    head = notes_on_codes(plan_of(mixed, head_dtype="int4"))
    assert "1 matrices are rounded" in head[0]
    assert "`--head-dtype source`" in head[0]


def test_what_is_held_in_numbers_takes_8_bits(w4a16: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(w4a16, tmp_path / "bundle", table_dtype="int8")
    assert bundle.manifest.head_dtype == "int8"
    assert bundle.manifest.parity.passed
    bits = {
        node.inputs[1].name: node.attributes["bits"].as_int()
        for node in ir.load(bundle.path / "model.onnx").graph
        if node.op_type == "MatMulNBits"
    }
    model = matched_model(w4a16).model
    matrices = [weight for weight in model.weights if weight.precision != "full"]
    stored = [width for name, width in bits.items() if "lm_head" not in name]
    assert stored.count(4) == sum(weight.codes is not None for weight in matrices)
    assert stored.count(8) == sum(weight.codes is None for weight in matrices) - 1


def test_codes_are_the_default_on_every_target(w4a16: Path, tmp_path: Path) -> None:
    info = pleexport.inspect(w4a16)
    assert {(e.table_dtype, e.weight_dtype) for e in info.targets} == {("source", "source")}
    assert info.weights == "found"
    shutil.copy(w4a16 / "config.json", tmp_path)
    assert pleexport.inspect(tmp_path).targets[0].graph_bytes == info.targets[0].graph_bytes
