"""Checkpoints of every layout are found; what does not fit is named, all of it at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import write_tensors
from checkpoints import gemma4_multimodal

import pleexport
from pleexport import families, targets
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import (
    BundleError,
    CheckpointError,
    PleexportError,
    TargetError,
    UnsupportedError,
)

Tensors = dict[str, Any]


def bind(folder: Path) -> MatchedModel:
    source = Checkpoint(folder)
    return MatchedModel(families.resolve(source), source)


def tensors_of(folder: Path) -> Tensors:
    source = Checkpoint(folder)
    return {name: np.array(source.array(name)) for name in source.entries}


@pytest.fixture
def remake(gemma4_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the checkpoint again with changed tensors or config."""

    def write(change: Callable[[Tensors], Tensors] = lambda t: t, **fields: object) -> Path:
        folder = tmp_path / "changed"
        config = json.loads((gemma4_checkpoint / "config.json").read_text()) | fields
        write_tensors(folder / "model.safetensors", change(tensors_of(gemma4_checkpoint)))
        kept = {name: value for name, value in config.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return write


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_every_key_prefix_is_found(prefix: str, remake: Callable[..., Path]) -> None:
    matched = bind(remake(renamed("model.", prefix)))
    assert matched.prefix == prefix


def with_head(prefix: str, name: str) -> Callable[[Tensors], Tensors]:
    """The text model below a prefix, and a head of its own under a name."""

    def change(tensors: Tensors) -> Tensors:
        head = tensors["model.embed_tokens.weight"] + 1
        return renamed("model.", prefix)(tensors) | {name: head}

    return change


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("model.", "lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("language_model.model.", "lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_a_head_is_found_beside_the_text_model(
    prefix: str, name: str, remake: Callable[..., Path]
) -> None:
    matched = bind(remake(with_head(prefix, name), tie_word_embeddings=False))
    (head,) = (weight for weight in matched.model.weights if weight.precision == "head")
    assert [entry.name for entry in matched.entries(head)] == [name]


def test_a_head_elsewhere_is_not_the_models(remake: Callable[..., Path]) -> None:
    folder = remake(with_head("model.", "heads.lm_head.weight"), tie_word_embeddings=False)
    with pytest.raises(CheckpointError) as caught:
        bind(folder)
    assert "`model.lm_head.weight` is missing" in caught.value.message
    assert "`heads.lm_head.weight` is used by nothing" in caught.value.message
    assert "fetch the model again" in str(caught.value.hint)


def test_where_parts_of_a_checkpoint_lie_is_the_familys_to_say(
    remake: Callable[..., Path],
) -> None:
    def change(tensors: Tensors) -> Tensors:
        tower = {"eyes.0.weight": np.ones((2, 3), np.float32)}
        return with_head("decoder.", "heads.lm_head.weight")(tensors) | tower

    source = Checkpoint(remake(change, tie_word_embeddings=False))
    model = families.resolve(source)
    with pytest.raises(CheckpointError, match=r"no tensor `embed_tokens.weight` under any of"):
        MatchedModel(model, source)
    matched = MatchedModel(
        replace(
            model, text_prefixes={"decoder.": ("heads.",)}, ignored_prefixes={"eyes.": "vision"}
        ),
        source,
    )
    assert matched.prefix == "decoder."
    assert [(part.name, part.parameters) for part in matched.left_out] == [("vision", 6)]


@pytest.mark.parametrize("place", ["model.", ""])
def test_towers_are_left_out_wherever_they_lie(place: str, remake: Callable[..., Path]) -> None:
    def add(tensors: Tensors) -> Tensors:
        ones = np.ones((2, 3), np.float32)
        names = ("vision_tower.0.weight", "embed_audio.weight")
        return tensors | {place + name: ones for name in names}

    parts = bind(remake(add)).left_out
    assert {part.name for part in parts} == {"vision tower", "audio projection"}
    # The control: a name that only begins alike is no tower.
    with pytest.raises(CheckpointError, match="vision_towers"):
        bind(remake(lambda tensors: tensors | {f"{place}vision_towers.0": np.ones(2)}))


def test_a_repack_with_a_foreign_prefix_is_verified_too(
    remake: Callable[..., Path], tmp_path: Path
) -> None:
    folder = remake(renamed("model.", "language_model.model."))
    bundle = pleexport.build(folder, tmp_path / "bundle", table_dtype="source", weight_dtype="fp32")
    assert bundle.manifest.parity.passed


def test_shards_are_read_through_their_index(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    tensors = tensors_of(gemma4_checkpoint)
    names, folder = sorted(tensors), tmp_path / "sharded"
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        write_tensors(folder / file, {name: tensors[name] for name in own})
    weight_map = {name: file for file, own in parts.items() for name in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(gemma4_checkpoint / "config.json", folder)
    matched = bind(folder)
    table = matched.model.tables[0]
    expected = bind(gemma4_checkpoint).rows(table, slice(3, 5))
    np.testing.assert_array_equal(matched.rows(table, slice(3, 5)), expected)

    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": "a.safetensors"}}))
    assert Checkpoint(folder).notes == [
        "`model.safetensors.index.json` lists tensor `ghost`, which is in no file; what the files "
        "have counts"
    ]
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lists it"):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="points outside the folder"):
        Checkpoint(folder)


def test_all_problems_are_named_at_once_with_the_nearest_name(
    remake: Callable[..., Path],
) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.gate_porj.weight"] = tensors.pop(
            "model.layers.1.mlp.gate_proj.weight"
        )
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
        tensors["model.layers.0.layer_scalar"] = np.array([1], dtype=np.int64)
        return tensors

    with pytest.raises(CheckpointError) as caught:
        bind(remake(spoil))
    message = caught.value.message
    assert "4 problems" in message
    assert (
        "`model.layers.1.mlp.gate_proj.weight` is missing "
        "(the nearest name is `model.layers.1.mlp.gate_porj.weight`)" in message
    )
    assert "`model.layers.1.mlp.gate_porj.weight` is used by nothing" in message
    assert "`model.norm.weight` has shape [5]; the model has [32]" in message
    assert "`model.layers.0.layer_scalar` has dtype int64" in message


def test_dead_tensors_of_sharing_layers_are_ignored(remake: Callable[..., Path]) -> None:
    def add(tensors: Tensors) -> Tensors:
        own = tensors["model.layers.0.self_attn.k_proj.weight"]
        return tensors | {"model.layers.3.self_attn.k_proj.weight": own}

    matched = bind(remake(add))
    assert matched.ignored == ["model.layers.3.self_attn.k_proj.weight"]


def test_towers_are_left_out_and_placeholders_look_up_the_padding_row(tmp_path: Path) -> None:
    matched = bind(gemma4_multimodal(tmp_path / "checkpoint"))
    assert {part.name for part in matched.left_out} >= {"vision tower", "vision projection"}
    assert all(part.parameters > 0 for part in matched.left_out)
    assert matched.model.row_aliases == {100: 0, 101: 0, 102: 0}


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no tables": ({"hidden_size_per_layer_input": 0}, "has no per-layer embedding tables"),
    "experts": ({"enable_moe_block": True}, "`enable_moe_block` = True is not implemented"),
    "two-way attention": ({"use_bidirectional_attention": "all"}, "is not implemented"),
    "an activation": ({"hidden_activation": "mish"}, "`hidden_activation` is 'mish'"),
    "a layer type": ({"layer_types": ["chunked_attention"] * 6}, "`chunked_attention`"),
    "a rope type": (
        {"rope_parameters": {t: {"rope_type": "yarn", "rope_theta": 1e4} for t in (
            "sliding_attention", "full_attention")}},
        "`rope_type` is 'yarn'",
    ),
    "a rope factor of nothing": (
        {"rope_parameters": {t: {"rope_type": "linear", "rope_theta": 1e4, "factor": 0} for t in (
            "sliding_attention", "full_attention")}},
        "`factor` is 0; expected a positive number",
    ),
    "a rope base beyond numbers": (
        {"rope_parameters": {t: {"rope_theta": float("nan")} for t in (
            "sliding_attention", "full_attention")}},
        "`rope_theta` is nan",
    ),
    "an unknown field that is false": ({"is_causal": False}, "unknown fields `is_causal`"),
    "a text part that is none": ({"text_config": "x"}, "`text_config` is 'x'; expected an object"),
    "a model type that is none": ({"model_type": []}, "`model_type` is []"),
    "layers beyond sense": ({"num_hidden_layers": 65_537}, "an integer from 1 to 1024"),
    "a size beyond sense": ({"hidden_size": 10**400}, "expected an integer from 1"),
    "an unknown field": ({"attention_sinks": 4}, "unknown fields `attention_sinks`"),
    "quantized weights": ({"quantization_config": {"bits": 4}}, "by `None` are not read"),
    "another family": ({"model_type": "llama"}, "model type `llama` is not supported"),
    "a family without tables": ({"model_type": "embedding_gemma2"}, "projections only"),
    "a per-layer override": (
        {"per_layer_config": {"1": {"intermediate_size": 7}}},
        "changes `intermediate_size` of layer 1",
    ),
    "a missing field": ({"hidden_size": "absent"}, "`hidden_size` is missing"),
    "a malformed field": ({"hidden_size": "wide"}, "`hidden_size` is 'wide'; expected an integer"),
    "too many sharing layers": ({"num_kv_shared_layers": 6}, "expected fewer than the 6 layers"),
    "nothing to share": (
        {"num_kv_shared_layers": 5},
        "layer 2 shares the keys of a `full_attention` layer before layer 1, but there is none",
    ),
    "uneven heads": ({"num_key_value_heads": 3}, "4 heads for 3 key heads"),
    "an unknown dtype": ({"dtype": "int8"}, "has dtype `int8`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_asks_for_and_is_not_done_is_refused_by_name(
    name: str, remake: Callable[..., Path]
) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(PleexportError) as caught:
        bind(remake(**fields))
    assert message in caught.value.message
    assert isinstance(caught.value, CheckpointError | UnsupportedError)


def multimodal(folder: Path, **fields: object) -> Path:
    """Wrap the config of a text checkpoint as multimodal checkpoints have it, in place."""
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": text["model_type"].removesuffix("_text"), "dtype": text["dtype"]}
    config = outer | {"text_config": text} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("field", ["attention_sinks", "quantization_config"])
def test_the_whole_config_of_a_multimodal_checkpoint_is_read(
    field: str, remake: Callable[..., Path]
) -> None:
    assert bind(multimodal(remake(), eos_token_id=[1, 106])).model.eos_token_ids == (1, 106)
    with pytest.raises(UnsupportedError, match=r"unknown fields|are not read"):
        bind(multimodal(remake(), **{field: {"bits": 4}}))


def test_a_multimodal_gemma3n_is_verified_without_its_towers(
    gemma3n_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    tensors = renamed("model.", "model.language_model.")(tensors_of(gemma3n_checkpoint))
    write_tensors(folder / "model.safetensors", tensors)
    shutil.copy(gemma3n_checkpoint / "config.json", folder)
    multimodal(folder, vision_config={"vocab_offset": 118}, audio_config={"vocab_offset": 119})
    bundle = pleexport.build(folder, tmp_path / "bundle", table_dtype="source", weight_dtype="fp32")
    assert bundle.manifest.parity.passed
    assert pleexport.Runner(bundle).blob.num_rows == 118


def test_a_head_that_contradicts_its_tie_is_refused(
    remake: Callable[..., Path], tmp_path: Path
) -> None:
    def add(change: float) -> Callable[[Tensors], Tensors]:
        def apply(tensors: Tensors) -> Tensors:
            own = tensors["model.embed_tokens.weight"].copy()
            own[-1] += own.dtype.type(change)
            return tensors | {"lm_head.weight": own}

        return apply

    bind(remake(add(0.0))).check_tied_head()
    with pytest.raises(CheckpointError, match=r"holds a different `lm_head.weight`"):
        pleexport.build(remake(add(1.0)), tmp_path / "bundle", verify=False)


def test_tensors_in_another_dtype_than_the_configs_are_rounded_as_the_original_does(
    remake: Callable[..., Path], tmp_path: Path
) -> None:
    def widen(tensors: Tensors) -> Tensors:
        noise = np.float32(1 + 2**-10)
        return {name: t.astype(np.float32) * noise for name, t in tensors.items()}

    folder = remake(widen)
    pleexport.build(folder, tmp_path / "bundle", table_dtype="source", weight_dtype="fp32")


def test_both_spellings_of_the_global_head_size_mean_the_same(
    remake: Callable[..., Path],
) -> None:
    saved = bind(remake()).model
    published = bind(remake(per_layer_config="absent", global_head_dim=16)).model
    assert saved.caches == published.caches


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an empty folder"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma4_text"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights"):
        Checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs devices and pipes")
@pytest.mark.parametrize("kind", ["device", "pipe", "huge"])
def test_files_without_an_end_are_not_read(kind: str, tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json", "target.toml"):
        path = tmp_path / name
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            with path.open("wb") as file:
                file.truncate(1 << 40)
    problem = "it has 1,099,511,627,776 bytes" if kind == "huge" else "it is no regular file"
    with pytest.raises(CheckpointError, match=rf"config.json` cannot be read: {problem}"):
        pleexport.inspect(tmp_path)
    with pytest.raises(BundleError, match=rf"`manifest.json` cannot be read \({problem}"):
        pleexport.Bundle(tmp_path, verify=False)
    with pytest.raises(TargetError, match=rf"target.toml` cannot be read: {problem}"):
        targets.load(str(tmp_path / "target.toml"))
