"""Families without an implementation elsewhere, against plain references."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import check_every_way_to_feed, exact_bundle, original_of
from family_checkpoints import embformer, lckv, llama_value_embeddings

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.export.calibration import importance
from pleexport.parity.oracle import open_oracle

VARIATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "embformer": (embformer, {}),
    "embformer untied, unshifted, in float16": (
        embformer,
        {"tie_word_embeddings": False, "use_channel_shift": False, "dtype": torch.float16},
    ),
    "embformer with windows, one key head, in bfloat16": (
        embformer,
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "dtype": torch.bfloat16,
        },
    ),
    "embformer uneven": (
        embformer,
        {
            "vocab_size": 37,
            "hidden_size": 60,
            "num_attention_heads": 10,
            "head_dim": 6,
            "num_key_value_heads": 5,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
        },
    ),
    "lckv": (lckv, {}),
    "lckv sandwich with windows": (
        lckv,
        {"layer_types": "0_3s_3_3s_4s", "sliding_window": 7, "attention_bias": True},
    ),
    "lckv without the diagonal, tied, in bfloat16": (
        lckv,
        {"force_nodiag": True, "tie_word_embeddings": True, "dtype": torch.bfloat16},
    ),
    "lckv only windows": (
        lckv,
        {"layer_types": "2s_2s_2s", "num_hidden_layers": 3, "sliding_window": 30, "mlp_bias": True},
    ),
    "lckv below only": (lckv, {"layer_types": "0_0_2_2_2", "num_key_value_heads": 6}),
    "llama value embeddings": (llama_value_embeddings, {}),
    "llama value embeddings uneven, in float16": (
        llama_value_embeddings,
        {
            "vocab_size": 53,
            "hidden_size": 40,
            "intermediate_size": 33,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 6,
            "value_embedding_layers": [2, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "dtype": torch.float16,
        },
    ),
}


def each(names: Iterable[str], *, slow: Collection[str]) -> list[Any]:
    """Those of which others vary the same are left to `make slow`."""
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names]


@pytest.mark.parametrize("name", each(VARIATIONS, slow=("lckv below only", "lckv only windows")))
def test_logits_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    make, changes = VARIATIONS[name]
    folder = make(tmp_path / "checkpoint", **changes)
    oracle = original_of(folder)
    check_every_way_to_feed(exact_bundle(folder, tmp_path / "bundle"), oracle.logits)


EMBFORMERS = [name for name in VARIATIONS if name.startswith("embformer")]


@pytest.mark.parametrize("name", each(EMBFORMERS, slow=EMBFORMERS[1:-1]))
def test_embformer_without_a_cache_is_the_same(name: str, tmp_path: Path) -> None:
    make, changes = VARIATIONS[name]
    folder = make(tmp_path / "checkpoint", **changes)
    oracle = original_of(folder)
    bundle = exact_bundle(folder, tmp_path / "bundle", cache_dtype="none")
    assert bundle.decoder.contract.caches == []
    check_every_way_to_feed(bundle, oracle.logits)


def test_only_embformer_goes_without_a_cache(tmp_path: Path) -> None:
    folder = llama_value_embeddings(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedError, match="do not follow from rows alone"):
        pleexport.build(folder, tmp_path / "bundle", cache_dtype="none")
    bundle = pleexport.build(embformer(tmp_path / "embformer"), tmp_path / "b", cache_dtype="none")
    assert bundle.manifest.parity.passed


@pytest.mark.parametrize(
    "make",
    [embformer, *(pytest.param(m, marks=pytest.mark.slow) for m in (lckv, llama_value_embeddings))],
)
def test_a_build_passes_parity_also_when_rounded(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint")
    for options in (
        {"weight_dtype": "fp32", "table_dtype": "source"},
        {"weight_dtype": "int8", "table_dtype": "int8", "cache_dtype": "int8"},
    ):
        bundle = pleexport.build(
            folder, tmp_path / "bundle", overwrite=True, context=512, **options
        )
        assert bundle.manifest.parity.passed


@pytest.mark.parametrize("make", [embformer, llama_value_embeddings])
def test_files_in_another_dtype_than_the_config_are_rounded_to_it(
    make: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "checkpoint")
    config = Checkpoint(folder).config | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bundle = pleexport.build(
        folder, tmp_path / "bundle", table_dtype="source", weight_dtype="fp32", context=512
    )
    assert bundle.manifest.parity.passed


def test_calibration_takes_a_token_at_a_time_where_the_model_does(tmp_path: Path) -> None:
    checkpoint = Checkpoint(lckv(tmp_path / "checkpoint"))
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    ids = list(range(1, 40))
    # What the last layer gets is right only if all layers saw what they should.
    hidden = open_oracle(matched).hidden(ids)[-2]
    normed = hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + 1e-5)
    normed *= checkpoint.array("model.layers.4.input_layernorm.weight")
    squares = np.square(normed).mean(0)
    got = importance(matched, ids)["layers.4.self_attn.q_proj.weight"]
    np.testing.assert_allclose(got, squares, rtol=1e-3)


def test_lckv_has_no_per_layer_tables(tmp_path: Path) -> None:
    info = pleexport.inspect(lckv(tmp_path / "checkpoint"))
    assert info.counts.per_layer_embedding == 0
    assert [table.name for table in info.tables] == ["embed_tokens"]
    # No form for a GPU; `inspect` goes on with the others.
    assert "web" in (names := {target.target for target in info.targets})
    assert "web-gpu" not in names
    assert any(note.startswith("There is no bundle for `web-gpu`: `lckv`") for note in info.notes)


def test_embformer_has_nothing_but_tables_and_a_head(tmp_path: Path) -> None:
    info = pleexport.inspect(embformer(tmp_path / "checkpoint"))
    assert info.counts.dense == 0
    assert info.counts.text == info.counts.main_embedding + info.counts.per_layer_embedding


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lckv, {"layer_types": "0_3_3_3"}, "`layer_types`"),
        (lckv, {"layer_types": "0_3_3_3_x"}, "`layer_types`"),
        (lckv, {"layer_types": "0_3_3_3_5"}, "`layer_types`"),
        (lckv, {"layer_types": "3s_3_3_3_3", "sliding_window": 1}, "`sliding_window`"),
        (embformer, {"head_dim": 6}, "`head_dim`"),
        (embformer, {"layer_types": ["sliding_attention"] * 4}, "`layer_types`"),
        (llama_value_embeddings, {"value_embedding_layers": [4]}, "`value_embedding_layers`"),
        (llama_value_embeddings, {"value_embedding_layers": []}, "`value_embedding_layers`"),
        (llama_value_embeddings, {"num_key_value_heads": 4}, "`num_key_value_heads`"),
    ],
)
def test_impossible_configs_are_refused(
    make: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = Checkpoint(make(tmp_path / "checkpoint")).config | changes
    with pytest.raises(CheckpointError, match=message):
        families.from_config(config, dtype="fp32")


def test_the_older_lckv_is_not_misread(tmp_path: Path) -> None:
    config = Checkpoint(lckv(tmp_path / "checkpoint")).config | {"model_type": "opt-llama"}
    with pytest.raises(UnsupportedError, match="opt-llama"):
        families.from_config(config, dtype="fp32")
