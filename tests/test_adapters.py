"""Adapters are merged as peft merges them, and what cannot be merged is refused by name."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from adapter_folders import (
    ATTENTION,
    MLP,
    MODEL,
    PER_LAYER,
    WEIGHTS,
    concatenate_with_peft,
    logits_of,
    merge_with_peft,
    rewrite_config,
    rewrite_tensors,
    save_adapter,
)
from checkpoints import gemma3n, gemma4, gemma4_multimodal
from conftest import SAMPLES, TOLERANCE, check_every_way_to_feed, relative_error
from safetensors.torch import load_file

import pleexport
from pleexport.checkpoint.adapters.adapted import AdaptedCheckpoint, tokenizer_folder
from pleexport.checkpoint.adapters.adapter import AdapterChoice
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError
from pleexport.families.opening import open_model
from pleexport.parity.merged_by_peft import can_merge
from pleexport.parity.oracle import open_oracle
from pleexport.progress import Progress
from pleexport.show.bundle import describe_bundle
from pleexport.show.inspection import describe_model


@pytest.fixture(scope="module", params=["gemma4", "gemma3n"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"gemma4": gemma4, "gemma3n": gemma3n}[request.param]
    return make(tmp_path_factory.mktemp("bases") / request.param, torch.float32)


@pytest.fixture(scope="module", params=["gemma4", "gemma3n"])
def base_bf16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"gemma4": gemma4, "gemma3n": gemma3n}[request.param]
    return make(tmp_path_factory.mktemp("bases16") / request.param, torch.bfloat16)


def merged_tensors(base: Path, *adapters: AdapterChoice) -> dict[str, torch.Tensor]:
    """By the names of transformers' model, all tensors that we merge or keep."""
    checkpoint, model = open_model(base, adapters=adapters)
    found = {}
    for name in checkpoint.entries:
        array = checkpoint.array(name).astype(np.float32)
        found[name] = torch.from_numpy(array)
    if model.head.key is not None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def largest_difference(expected: Any, got: dict[str, torch.Tensor]) -> float:
    """Of all tensors, relative to each one's largest value."""
    tensors = dict(expected.named_parameters(remove_duplicate=False))
    assert tensors.keys() <= got.keys()
    differences = []
    for name, tensor in tensors.items():
        wanted = tensor.detach().float()
        assert wanted.shape == got[name].shape, name
        differences.append(((wanted - got[name]).abs().max() / wanted.abs().max()).item())
    return max(differences)


CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 16},
    "all linear": {"target_modules": "all-linear", "r": 3},
    "a regular expression": {"target_modules": r".*\.layers\.[02]\.mlp\.(up|down)_proj", "r": 4},
    "ranks and alphas": {
        "target_modules": ATTENTION + MLP,
        "r": 4,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.mlp\.up_proj": 6},
        "alpha_pattern": {"down_proj": 32, "^model.layers.0.self_attn.o_proj": 3},
    },
    "rank stabilized": {"target_modules": MLP, "r": 4, "use_rslora": True, "lora_alpha": 5},
    "dora": {"target_modules": [*ATTENTION, "embed_tokens_per_layer"], "r": 4, "use_dora": True},
    "per-layer projections": {"target_modules": PER_LAYER, "r": 4, "lora_alpha": 12},
    "per-layer table": {"target_modules": ["embed_tokens_per_layer", "q_proj"], "r": 4},
    "input embedding": {"target_modules": ["embed_tokens"], "r": 4},
    "head": {"target_modules": ["lm_head", "q_proj"], "r": 4},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "r": 4},
    "tied by peft": {"target_modules": ["embed_tokens"], "r": 4, "ensure_weight_tying": True},
    "embedding and head saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "table saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens_per_layer"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7, 70]},
    "tokens of both tables": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 7], "embed_tokens_per_layer": [6]},
    },
    "fan in, fan out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_peft_merges(base: Path, case: str, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **CASES[case])
    expected = merge_with_peft(base, adapter)
    assert largest_difference(expected, merged_tensors(base, adapter)) < 1e-6
    # The control: the adapter does change something.
    assert largest_difference(merge_with_peft(base), merged_tensors(base, adapter)) > 1e-2


@pytest.mark.parametrize(
    "case",
    ["all linear", "dora", "input embedding", "embedding and head saved", "table saved", "tokens"],
)
def test_merged_tensors_of_16_bits_are_rounded_as_peft_rounds_them(
    base_bf16: Path, case: str, tmp_path: Path
) -> None:
    adapter = save_adapter(base_bf16, tmp_path / "adapter", **CASES[case])
    expected = merge_with_peft(base_bf16, adapter)
    got = merged_tensors(base_bf16, adapter)
    differ, count = 0, 0
    for name, tensor in expected.named_parameters(remove_duplicate=False):
        assert tensor.dtype == torch.bfloat16
        differ += int((tensor.float() != got[name]).sum())
        count += tensor.numel()
    # A sum in another order rounds one of some ten thousand numbers otherwise.
    assert differ < 1e-3 * count


@pytest.mark.parametrize("make", [gemma4, pytest.param(gemma3n, marks=pytest.mark.slow)])
def test_a_bundle_computes_what_peft_merges(make: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base", torch.float32)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP + PER_LAYER}
    fields["target_modules"] += ["embed_tokens", "embed_tokens_per_layer"]
    adapter = save_adapter(base, tmp_path / "adapter", **fields)
    bundle = pleexport.build(
        base, tmp_path / "bundle", adapters=[adapter], weight_dtype="fp32", table_dtype="source"
    )
    assert bundle.manifest.parity.passed
    original = logits_of(merge_with_peft(base, adapter))
    check_every_way_to_feed(bundle, original)

    # Controls: another scale, and the matrices of two layers exchanged.
    ids = list(range(40))
    got = pleexport.Runner(bundle).logits(ids)
    assert relative_error(original(ids), got) < TOLERANCE
    rewrite_config(adapter, lora_alpha=9)
    assert relative_error(logits_of(merge_with_peft(base, adapter))(ids), got) > 10 * TOLERANCE
    rewrite_config(adapter, lora_alpha=8)
    rewrite_tensors(adapter, exchange_layers)
    assert relative_error(logits_of(merge_with_peft(base, adapter))(ids), got) > 100 * TOLERANCE


def exchange_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first matrices of two layers, each in the other's place."""
    one, other = (f"base_model.model.model.layers.{i}.mlp.up_proj.lora_A.weight" for i in (0, 1))
    return tensors | {one: tensors[other], other: tensors[one]}


UNTIED: dict[str, dict[str, Any]] = {
    "tokens of both": {
        "target_modules": "all-linear",
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]},
    },
    "products of both": {"target_modules": ["lm_head", "embed_tokens"]},
    "biases of targets": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "a bias of its own": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied") / "gemma4"
    return gemma4(folder, torch.float32, tie_word_embeddings=False, attention_bias=True)


@pytest.mark.parametrize("case", UNTIED)
def test_an_untied_head_and_biases_are_merged(untied: Path, case: str, tmp_path: Path) -> None:
    adapter = save_adapter(untied, tmp_path / "adapter", r=4, **UNTIED[case])
    expected = merge_with_peft(untied, adapter)
    assert largest_difference(expected, merged_tensors(untied, adapter)) < 1e-6
    # The control: the adapter does change something.
    assert largest_difference(expected, merged_tensors(untied)) > 1e-2


GROWN: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "all tables saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "embed_tokens_per_layer"],
    },
    "trained": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [120, 126]},
}


@pytest.mark.parametrize("rows", [127, 118])
@pytest.mark.parametrize("case", GROWN)
def test_the_vocabulary_grows_and_shrinks_with_the_adapter(
    base: Path, case: str, rows: int, tmp_path: Path
) -> None:
    if case == "tokens" and rows < 120:
        pytest.skip("these tokens would be gone")
    adapter = save_adapter(base, tmp_path / "adapter", rows=rows, **GROWN[case])
    expected = merge_with_peft(base, adapter, rows=rows)
    # Rows that nobody trained have noise of 3e-5 standard deviations in transformers.
    assert largest_difference(expected, merged_tensors(base, adapter)) < 1e-4
    checkpoint, model = open_model(base, adapters=[adapter])
    assert model.vocab_size == rows
    assert model.tables[1].rows == rows
    noted = any("embed_tokens_per_layer" in note for note in checkpoint.notes)
    assert noted == (rows > 120 and case != "all tables saved")


def test_several_adapters_are_merged_one_after_the_other(base: Path, tmp_path: Path) -> None:
    first = save_adapter(base, tmp_path / "first", target_modules=[*ATTENTION, "embed_tokens"])
    second = save_adapter(base, tmp_path / "second", target_modules=ATTENTION + MLP, r=3, seed=1)
    third = save_adapter(base, tmp_path / "third", target_modules=MLP, use_dora=True, seed=2)
    expected = merge_with_peft(base, (first, 0.5), (second, -0.25), third)
    got = merged_tensors(base, f"{first}:0.5", (second, -0.25), third)
    assert largest_difference(expected, got) < 1e-6
    # Controls: another weight, and another order, where norms are set in between.
    assert largest_difference(expected, merged_tensors(base, first, (second, -0.25), third)) > 1e-3
    assert largest_difference(expected, merged_tensors(base, third, f"{first}:0.5")) > 1e-3


def test_weighted_adapters_are_what_peft_concatenates(base: Path, tmp_path: Path) -> None:
    folders = [
        save_adapter(base, tmp_path / name, target_modules=ATTENTION, r=rank, seed=rank)
        for name, rank in (("one", 2), ("two", 3))
    ]
    expected = concatenate_with_peft(base, folders, [0.7, 0.2])
    got = merged_tensors(base, (folders[0], 0.7), (folders[1], 0.2))
    assert largest_difference(expected, got) < 1e-6


SPELLINGS = {
    "as peft writes them": lambda name: name,
    "with an adapter's name": lambda name: re.sub(
        r"\.(lora_[AB]|lora_embedding_[AB])", r".\1.default", name
    ),
    "below a multimodal wrapper": lambda name: name.replace(
        "model.model.", "model.model.language_model.", 1
    ),
    "below an older wrapper": lambda name: name.replace(
        "model.model.", "model.language_model.model.", 1
    ),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "compiled around peft": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
    "without peft's prefix": lambda name: name.removeprefix("base_model.model."),
    "below DataParallel": lambda name: f"module.{name}",
    "below a value head": lambda name: name.replace(
        "base_model.model.", "pretrained_model.base_model.model.", 1
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_are_read_as_trainers_write_them(base: Path, spelling: str, tmp_path: Path) -> None:
    targets = [*ATTENTION, "per_layer_projection", "embed_tokens", "embed_tokens_per_layer"]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=targets)
    expected = merge_with_peft(base, adapter)
    written = SPELLINGS[spelling]
    rewrite_tensors(adapter, lambda tensors: {written(n): t for n, t in tensors.items()})
    assert largest_difference(expected, merged_tensors(base, adapter)) < 1e-6


def test_an_adapter_of_a_multimodal_model_is_merged_into_its_text_part(tmp_path: Path) -> None:
    base = gemma4_multimodal(tmp_path / "base")
    adapter = save_adapter(
        base,
        tmp_path / "adapter",
        kind=transformers.AutoModelForImageTextToText,
        target_modules=r".*(text|language)_model.*\.(q_proj|up_proj|embed_tokens_per_layer)|.*\.linear",
    )
    names = load_file(adapter / WEIGHTS).keys()
    assert any(".vision_tower." in name for name in names)
    checkpoint, _ = open_model(base, adapters=[adapter])
    assert isinstance(checkpoint, AdaptedCheckpoint)
    _, note = checkpoint.notes
    assert "vision tower" in note
    expected = merge_with_peft(base, adapter, kind=transformers.AutoModelForImageTextToText)
    tensors = expected.state_dict()
    for name in checkpoint.merged:
        wanted = tensors[name].float()
        got = torch.from_numpy(checkpoint.array(name).astype(np.float32))
        assert ((wanted - got).abs().max() / wanted.abs().max()).item() < 1e-2, name
        assert (wanted != got).float().mean().item() < 1e-3, name
    assert (
        len(checkpoint.merged)
        == len(names) // 2 - sum(".vision_tower." in name for name in names) // 2
    )


def test_a_row_is_the_same_among_any_others(base_bf16: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base_bf16, tmp_path / "adapter", target_modules=["embed_tokens"], r=16)
    checkpoint, model = open_model(base_bf16, adapters=[adapter])
    matched = MatchedModel(model, checkpoint)
    table = model.tables[0]
    whole = matched.row_values(table, slice(None))
    for rows in (slice(3, 70), slice(64, 65), np.array([7, 119, 7, 64])):
        np.testing.assert_array_equal(matched.row_values(table, rows), whole[rows])


def test_no_merged_table_is_in_memory_as_a_whole(tmp_path: Path) -> None:
    rows = 100_000
    base = gemma4(
        tmp_path / "base", torch.float32, vocab_size=rows, vocab_size_per_layer_input=rows
    )
    tables = ["embed_tokens_per_layer", "embed_tokens"]
    for name, fields in (("lora", {}), ("dora", {"use_dora": True})):
        adapter = save_adapter(base, tmp_path / name, target_modules=tables, r=2, **fields)
        tracemalloc.start()
        checkpoint, model = open_model(base, adapters=[adapter])
        matched = MatchedModel(model, checkpoint)
        table, batch = model.tables[1], 512
        for begin in range(0, rows, batch):
            matched.row_values(table, slice(begin, begin + batch))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * rows * table.row_width / 3
        # The control: as a whole it takes that much, and more.
        tracemalloc.start()
        matched.row_values(table, slice(None))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak > 4 * rows * table.row_width


def test_an_adapters_tokenizer_goes_before_its_bases(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    folder = shutil.copytree(base, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLES / "gemma4-kjv" / name, folder / name)
    checkpoint, _ = open_model(folder, adapters=[adapter])
    assert tokenizer_folder(checkpoint) == folder
    shutil.copyfile(folder / "tokenizer.json", adapter / "tokenizer.json")
    assert tokenizer_folder(checkpoint) == adapter
    assert tokenizer_folder(open_model(folder)[0]) == folder


def test_inspect_lists_the_adapters(base: Path, tmp_path: Path) -> None:
    first = save_adapter(base, tmp_path / "first", target_modules=["q_proj"], r=4)
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 9}, "use_rslora": True}
    second = save_adapter(base, tmp_path / "second", target_modules=["q_proj"], r=4, **patterns)
    info = pleexport.inspect(base, adapters=[first, (second, 0.5)])
    assert [(a.name, a.weight, a.form, a.trained_on) for a in info.adapters] == [
        ("first", 1.0, "LoRA of rank 4", str(base)),
        ("second", 0.5, "rank-stabilized LoRA of rank 4 to 9", str(base)),
    ]
    shown = describe_model(info)
    assert "Adapters, merged in this order" in shown
    assert "`first`, `second` times 0.5 merged into" in shown
    assert "Adapters" not in describe_model(pleexport.inspect(base))


def test_a_bundle_knows_its_adapters_and_is_verified_with_them(tmp_path: Path) -> None:
    base = gemma4(tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        bundle = pleexport.build(
            adapter,  # its config names the base
            tmp_path / "bundle",
            verify=False,
            weight_dtype="fp32",
            table_dtype="source",
            progress=Progress(),
        )
    assert "note: `adapter` merged into `base`: 12 tensors change" in said.getvalue()
    manifest = bundle.manifest
    assert [(a.name, a.weight) for a in manifest.adapters] == [("adapter", 1.0)]
    assert manifest.source is not None
    assert [file.name for file in manifest.source.files] == ["config.json", "model.safetensors"]
    assert "adapters merged: adapter\n" in describe_bundle(bundle)

    report = pleexport.verify(bundle, checkpoint=base, adapters=[adapter])
    assert report is not None
    assert report.passed
    assert report.oracle.endswith(f", adapters merged by peft {peft.__version__}")
    with pytest.raises(CheckpointError, match=r"with `adapter:1`, and .* is given with none"):
        pleexport.verify(bundle, checkpoint=base)
    with pytest.raises(CheckpointError, match="is given with others"):
        pleexport.verify(bundle, checkpoint=base, adapters=[f"{adapter}:0.5"])
    other = gemma4(tmp_path / "other", torch.float32)
    rewrite_tensors(other, lambda tensors: {n: t + 1 for n, t in tensors.items()}, MODEL)
    with pytest.raises(CheckpointError, match=r"was built from another base than"):
        pleexport.verify(bundle, checkpoint=other, adapters=[adapter])
    # The control: an adapter that was changed after the build is another one.
    rewrite_config(adapter, lora_alpha=9)
    with pytest.raises(CheckpointError, match="is given with others"):
        pleexport.verify(bundle, checkpoint=base, adapters=[adapter])


@pytest.mark.parametrize("case", ["all linear", "dora", "both", "embedding saved", "tokens"])
def test_the_original_is_the_same_without_peft(
    base: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **CASES[case])
    checkpoint, model = open_model(base, adapters=[adapter])
    matched = MatchedModel(model, checkpoint)
    by_peft = open_oracle(matched)
    assert by_peft.name.endswith(f"merged by peft {peft.__version__}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    by_us = open_oracle(matched)
    assert by_us.name.endswith("merged by pleexport")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    assert relative_error(by_peft.logits(ids), by_us.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_merges_only_what_it_merges_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    base = gemma4(tmp_path / "base", dtype)

    def can(*adapters: Path) -> bool:
        checkpoint, _ = open_model(base, adapters=adapters)
        assert isinstance(checkpoint, AdaptedCheckpoint)
        return can_merge(checkpoint)

    one = save_adapter(base, tmp_path / "one", target_modules=["q_proj"])
    two = save_adapter(base, tmp_path / "two", target_modules=["q_proj"])
    assert can(one)
    # It rounds after each.
    assert can(one, two) == (dtype == torch.float32)
    grown = save_adapter(base, tmp_path / "grown", rows=127, target_modules=["q_proj"])
    assert not can(grown)
    rewrite_tensors(one, lambda t: {n.replace("_model.", "_model.module.", 1): t[n] for n in t})
    assert not can(one)


@pytest.mark.parametrize("target", ["embed_tokens", "embed_tokens_per_layer"])
def test_an_adapter_of_trained_tokens_is_merged(base: Path, target: str, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(target_modules=[target], token_indices=[3, 117])
    adapter = save_adapter(base, tmp_path / "adapter", config=config)
    expected = merge_with_peft(base, adapter)
    assert largest_difference(expected, merged_tensors(base, adapter)) < 1e-6
    (info,) = pleexport.inspect(base, adapters=[adapter]).adapters
    assert info.form == "trained tokens"
    # The control: the adapter does change something.
    assert largest_difference(expected, merged_tensors(base)) > 1e-2


def test_numbers_of_an_adapter_that_are_none_are_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors = load_file(adapter / WEIGHTS)
    tensors[name][3] = float("nan")
    rewrite_tensors(adapter, lambda _: tensors)
    with pytest.raises(CheckpointError) as err:
        pleexport.build(base, tmp_path / "bundle", adapters=[adapter], verify=False)
    said = "with adapters merged: tensor `model.layers.1.self_attn.q_proj.weight` has nan at [3, 0]"
    assert said in err.value.message


@pytest.mark.filterwarnings("error:overflow", "error:invalid value")
def test_products_of_an_adapter_that_are_too_large_are_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite_tensors(adapter, lambda tensors: {n: t.sign() * 1e30 for n, t in tensors.items()})
    with pytest.raises(CheckpointError) as err:
        pleexport.build(base, tmp_path / "bundle", adapters=[adapter], verify=False)
    assert "layers.0.self_attn.q_proj.weight` has " in err.value.message


def test_an_adapter_beside_its_base_is_merged_when_it_is_asked_for(
    base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    save_adapter(base, folder, target_modules=["q_proj"])
    plain, _ = open_model(folder)
    assert any("is not merged" in note for note in plain.notes)
    merged, _ = open_model(folder, adapters=[folder])
    assert not any("is not merged" in note for note in merged.notes)
    expected = merge_with_peft(base, folder)
    assert largest_difference(expected, merged_tensors(folder, folder)) < 1e-6
