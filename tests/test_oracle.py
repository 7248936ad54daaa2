"""The original is loaded as its family says."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from checkpoints import gemma3n, gemma4

from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.errors import CheckpointError
from pleexport.model import TransformersOriginal
from pleexport.parity.oracle import TransformersOracle

IDS = [3, 1, 4, 1, 5, 9]


def how_to_load(checkpoint: Checkpoint) -> TransformersOriginal:
    original = families.resolve(checkpoint).transformers
    assert original is not None
    return original


def open_original(folder: Path, **changes: Any) -> TransformersOracle:
    checkpoint = Checkpoint(folder)
    return TransformersOracle(checkpoint, original=replace(how_to_load(checkpoint), **changes))


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (gemma4, {"final_logit_softcapping": 30, "initializer_range": 1}),
        (gemma3n, {"final_logit_softcapping": 30, "altup_coef_clip": 120}),
    ],
)
def test_whole_numbers_are_floats_where_transformers_wants_them(
    make: Callable[..., Path], fields: dict[str, int], tmp_path: Path
) -> None:
    folder = make(tmp_path / "checkpoint")
    expected = open_original(folder).logits(IDS)
    rewrite_config(folder, lambda config: config | fields)
    np.testing.assert_array_equal(open_original(folder).logits(IDS), expected)
    # The control: transformers does refuse them.
    with pytest.raises(Exception, match="expected float"):
        open_original(folder, float_fields=frozenset())


def test_what_the_whole_config_says_counts_for_its_text_part(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "checkpoint")

    def wrap(config: dict[str, Any]) -> dict[str, Any]:
        text = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
        whole = {"model_type": "gemma4", "dtype": config["dtype"], "tie_word_embeddings": False}
        return whole | {"text_config": text}

    rewrite_config(folder, wrap)
    with pytest.raises(CheckpointError, match=r"does not find `lm_head.weight`") as err:
        open_original(folder)
    assert err.value.hint is not None
    assert "`--no-verify`" in err.value.hint
    # The control: the text part alone leaves the head tied, and the file has none.
    open_original(folder, inherited={})


def test_streams_are_behind_the_positions(gemma3n_checkpoint: Path) -> None:
    oracle = open_original(gemma3n_checkpoint)
    shapes = {values.shape for values in oracle.hidden(IDS)}
    assert shapes == {(len(IDS), 4, 32)}


def test_what_transformers_says_is_given_back(
    gemma4_checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, filters = logging.getLogger("transformers"), list(warnings.filters)
    monkeypatch.setattr(logger, "level", logging.INFO)
    # Whatever the environment says of bars.
    monkeypatch.setattr(transformers.logging, "_tqdm_active", True)
    oracle = open_original(gemma4_checkpoint)
    oracle.logits(IDS)
    oracle.hidden(IDS)
    assert capfd.readouterr().err == ""
    assert logger.level == logging.INFO
    assert transformers.logging.is_progress_bar_enabled()
    assert transformers.logging.set_tqdm_hook(None) is None
    assert warnings.filters == filters
    # The control: left alone, it draws a bar.
    transformers.AutoModelForCausalLM.from_pretrained(gemma4_checkpoint)
    assert "Loading weights" in capfd.readouterr().err


def test_what_transformers_says_is_given_back_after_an_error(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    level = logging.getLogger("transformers").level
    with pytest.raises(CheckpointError, match=r"cannot load the .*: .* no file named model\.saf"):
        open_original(folder)
    assert logging.getLogger("transformers").level == level
    assert transformers.logging.set_tqdm_hook(None) is None
