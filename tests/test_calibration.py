"""Importances are those of transformers' own inputs, and weights are rounded by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from conftest import SAMPLES
from torch import nn
from transformers import AutoModelForCausalLM

import pleexport
from pleexport import families
from pleexport.backends.onnx.blocks import quantize_blocks
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError, InputError, TargetError
from pleexport.export.calibration import importance

IDS = [int(i) for i in np.random.default_rng(3).integers(1, 100, 700)]  # two windows


@pytest.mark.parametrize("make", [checkpoints.gemma4, checkpoints.gemma3n])
def test_importances_are_mean_squares_of_the_inputs_of_transformers(
    make: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "checkpoint", torch.float32)
    checkpoint = Checkpoint(folder)
    got = importance(MatchedModel(families.resolve(checkpoint), checkpoint), IDS)
    expected = expected_importance(folder)
    assert got.keys() <= expected.keys()
    assert {"lm_head.weight", "layers.5.mlp.down_proj.weight"} <= got.keys()
    for name, values in got.items():
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, atol=1e-5, err_msg=name)


def test_calibrated_blocks_err_less_where_it_matters() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((64, 256)).astype(np.float32)
    important = np.exp(3 * generator.standard_normal(256)).astype(np.float32)

    def cost(given: Any) -> float:
        blocks = quantize_blocks(weight, bits=4, block_size=32, importance=given)
        low, high = blocks.codes & 15, blocks.codes >> 4
        codes = np.stack((low, high), -1).reshape(64, -1, 32).astype(np.float32) - 8
        error = (codes * blocks.scales[..., None]).reshape(64, 256) - weight
        return float((error**2 * important).sum())

    assert cost(important) < 0.9 * cost(None)
    assert cost(important * np.float32(1e-30)) == pytest.approx(cost(important), rel=1e-3)
    assert cost(np.zeros(256, np.float32)) == pytest.approx(cost(None), rel=1e-3)


def test_a_calibrated_bundle_says_so_and_passes(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("And the people answered with one voice. " * 20, encoding="utf-8")
    sample = SAMPLES / "gemma4-kjv"
    plain = pleexport.build(sample, tmp_path / "plain", target="android", verify=False)
    bundle = pleexport.build(sample, tmp_path / "bundle", target="android", calibrate=text)
    assert plain.manifest.calibration_tokens == 0
    assert bundle.manifest.calibration_tokens > 100
    assert bundle.manifest.parity.passed
    assert bundle.nbytes == pytest.approx(plain.nbytes, rel=1e-3)
    assert bundle.decoder.weights_digest != plain.decoder.weights_digest


def test_calibration_that_cannot_be_done_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(InputError, match=r"text\.txt` cannot be read"):
        pleexport.build(SAMPLES / "gemma4-kjv", tmp_path / "bundle", calibrate=text)
    text.write_text("In the beginning", encoding="utf-8")
    with pytest.raises(TargetError, match="calibration chooses scales of int8 and int4"):
        pleexport.build(
            SAMPLES / "gemma4-kjv", tmp_path / "bundle", weight_dtype="fp32", calibrate=text
        )
    with pytest.raises(CheckpointError, match="no tokenizer, so"):
        pleexport.build(checkpoints.gemma4(tmp_path / "bare"), tmp_path / "bundle", calibrate=text)
    assert not (tmp_path / "bundle").exists()


def expected_importance(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    totals: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def add(_module: Any, inputs: tuple[torch.Tensor], name: str = name) -> None:
                key = f"{name.removeprefix('model.')}.weight"
                square = inputs[0].square().flatten(0, -2).sum(0)
                totals[key] = totals.get(key, torch.zeros(())) + square

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for begin in range(0, len(IDS), 512):
            model(input_ids=torch.tensor([IDS[begin : begin + 512]]), use_cache=False)
    return {name: (total / len(IDS)).numpy() for name, total in totals.items()}
