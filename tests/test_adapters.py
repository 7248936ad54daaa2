"""Adapters are merged as peft merges them, and what cannot be merged is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_folders import (
    ATTENTION,
    MLP,
    PER_LAYER,
    logits_of,
    merge_with_peft,
    rewrite_config,
    rewrite_tensors,
    save_adapter,
)
from checkpoints import gemma3n, gemma4
from conftest import TOLERANCE, check_every_way_to_feed, relative_error

import pleexport
from pleexport.checkpoint.adapters.adapter import AdapterChoice
from pleexport.families.opening import open_model


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
    opened = open_model(base, adapters=adapters)
    checkpoint = opened.checkpoint
    found = {}
    for name in checkpoint.entries:
        array = checkpoint.array(name).astype(np.float32)
        found[name] = torch.from_numpy(array)
    if opened.model.head.key is not None:
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


@pytest.mark.parametrize("make", [gemma4, gemma3n])
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
