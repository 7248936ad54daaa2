"""Gradients on a text are those of transformers, and predict what rounding costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from conftest import SAMPLES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pleexport import families, operators
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.export import gradients as module
from pleexport.export.gradients import Gradients, gradients
from pleexport.export.sensitivity import MeasuredSensitivity
from pleexport.model import Weight
from pleexport.parity.metrics import mean_kl
from pleexport.runtime.tokenizer import open_tokenizer, tokenizer_files

IDS = [int(i) for i in np.random.default_rng(3).integers(1, 100, 200)]  # two windows


def matched_model(folder: Path) -> MatchedModel:
    checkpoint = Checkpoint(folder)
    return MatchedModel(families.resolve(checkpoint), checkpoint)


@pytest.mark.parametrize("make", [checkpoints.gemma4, checkpoints.gemma3n])
def test_gradients_are_those_of_transformers(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint", torch.float32)
    got = gradients(matched_model(folder), IDS)
    expected = gradients_of_transformers(folder)
    assert got.inputs.keys() <= expected.inputs.keys()
    assert {"lm_head.weight", "layers.5.mlp.down_proj.weight"} <= got.inputs.keys()
    for name in got.inputs:
        for mine, other in (
            (got.inputs[name], expected.inputs[name]),
            (got.outputs[name], expected.outputs[name]),
        ):
            np.testing.assert_allclose(
                mine, other, rtol=0.01, atol=1e-3 * other.max(), err_msg=name
            )
    # The control: with inputs and gradients of other tokens, the products are other ones.
    shuffled = gradients(matched_model(folder), IDS[::-1])
    name = "layers.5.mlp.down_proj.weight"
    assert not np.allclose(shuffled.inputs[name], expected.inputs[name], rtol=0.05)


def gradients_of_transformers(folder: Path) -> Gradients:
    model = AutoModelForCausalLM.from_pretrained(folder)
    sums, generator = Gradients(), np.random.default_rng(0)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):

            def watch(_: Any, inputs: tuple[Tensor], outputs: Tensor, name: str = name) -> None:
                key = f"{name.removeprefix('model.')}.weight"
                outputs.register_hook(lambda g: sums.add(key, inputs[0].detach(), g))

            linear.register_forward_hook(watch)
    for begin in range(0, len(IDS), 128):
        ids = torch.tensor([IDS[begin : begin + 128]])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        module._log_probability_of_drawn(logits, generator).backward()
    for kept in (sums.inputs, sums.outputs):
        kept.update({name: total / len(IDS) for name, total in kept.items()})
    return sums


@pytest.mark.parametrize("name", ["rotate", "attend_window", "attend_context", "wkv7"])
def test_operators_have_the_gradients_of_their_definitions(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (0.3 * values).requires_grad_()

    given: dict[str, tuple[Any, ...]] = {
        "rotate": (noise(1, 3, 2, 4), noise(1, 3, 2), noise(1, 3, 2)),
        "attend_window": (noise(1, 3, 4, 4), noise(1, 2, 5, 4), noise(1, 2, 5, 4), noise(1, 3, 5)),
        "wkv7": (*(noise(1, 3, 2, 4) for _ in range(6)), noise(1, 2, 4, 4)),
    }
    if name == "attend_context":
        ids, held = torch.arange(2, 5)[None], torch.arange(5)
        cache = [noise(1, 2, 5, 4).detach().float().requires_grad_() for _ in range(2)]
        query = noise(1, 3, 4, 4).detach().float().requires_grad_()
        operators.attend_context(query, cache, ids, held, 5, 0.0, 3).square().sum().backward()
        got = [x.grad.clone() for x in (query, *cache) if x.grad is not None]
        bias = operators.attention_bias(ids, held, window=3)
        operators.attend(query, *cache, bias).square().sum().backward()
        for mine, x in zip(got, (query, *cache), strict=True):
            torch.testing.assert_close(2 * mine, x.grad)
        return
    operator = getattr(operators, name)
    assert torch.autograd.gradcheck(operator, given[name])


@pytest.mark.parametrize(
    ("what", "dtype"),
    [
        ("layers.3.mlp.down_proj.weight", "int4"),
        ("layers.1.self_attn.o_proj.weight", "int4"),
        ("embed_tokens_per_layer", "int4"),
        ("embed_tokens_per_layer", "int8"),
    ],
)
def test_a_prediction_is_about_what_rounding_costs(what: str, dtype: str) -> None:
    folder = SAMPLES / "gemma4-kjv"
    matched, ids = matched_model(folder), sample_ids(folder)
    measured = MeasuredSensitivity(matched, ids, lambda: sample_gradients(folder))
    tables = {table.name: table for table in matched.model.tables}
    if what in tables:
        predicted = measured.table(tables[what], dtype)
    else:
        weight = next(w for w in matched.model.weights if w.name == what)
        predicted = measured.matrix(weight, dtype, block_size=256)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameter = model.get_parameter(f"model.{what}" + (".weight" if what in tables else ""))
    with torch.no_grad():
        before = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        parameter.copy_(rounded(matched, what, dtype))
        after = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert predicted == pytest.approx(mean_kl(before, got=after), rel=0.5)


def rounded(matched: MatchedModel, what: str, dtype: str) -> Tensor:
    """A table or a matrix as a bundle has it, in float32."""
    from pleexport.export.sensitivity import _block_errors, _row_errors

    tables = {table.name: table for table in matched.model.tables}
    if what in tables:
        table = tables[what]
        values = matched.row_values(table, slice(0, table.rows))
        rows = values.reshape(-1, table.width)
        group = min({"int8": 128, "int4": 32}[dtype], table.width)
        return torch.from_numpy(values + _row_errors(rows, dtype, group).reshape(values.shape))
    weight: Weight = next(w for w in matched.model.weights if w.name == what)
    values = matched.read(weight)
    group = next(b for b in (256, 128, 64, 32) if weight.shape[1] % b == 0)
    return torch.from_numpy(values + _block_errors(values, dtype, group))


_FOUND: dict[Path, Gradients] = {}


def sample_ids(folder: Path) -> list[int]:
    tokenizer = open_tokenizer(tokenizer_files(folder))
    assert tokenizer is not None
    text = SAMPLES / "heldout.txt"
    return tokenizer.encode_file(text, num_rows=4096)[:512]


def sample_gradients(folder: Path) -> Gradients:
    if folder not in _FOUND:
        _FOUND[folder] = gradients(matched_model(folder), sample_ids(folder))
    return _FOUND[folder]
