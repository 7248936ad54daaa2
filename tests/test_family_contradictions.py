"""A family that contradicts itself is told so by name, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pleexport
from pleexport import families
from pleexport.errors import FamilyError
from pleexport.model import GraphOutputs, Model, State, Unused, Weight


def with_forward(model: Model, change: Callable[[GraphOutputs], GraphOutputs]) -> Model:
    """A model whose forward function gives something else."""
    real = model.forward
    return replace(model, forward=lambda weights, inputs: change(real(weights, inputs)))


def without_weight(model: Model, name: str) -> Model:
    shape = next(w.source_shape for w in model.weights if w.name == name)
    unused = {**model.unused, name: Unused(shape, "forgotten")}
    return replace(model, weights=tuple(w for w in model.weights if w.name != name), unused=unused)


def as_full(model: Model, name: str, precision: Any) -> Model:
    weights = (replace(w, precision=precision) if w.name == name else w for w in model.weights)
    return replace(model, weights=tuple(weights))


GATE = "layers.0.mlp.gate_proj.weight"
SCALAR = "layers.0.layer_scalar"


@pytest.mark.parametrize(
    ("contradict", "message"),
    [
        (lambda m: without_weight(m, GATE), f"takes the weight `{GATE}`, which"),
        (lambda m: as_full(m, "layers.0.input_layernorm.weight", "quantizable"), "takes it"),
        (
            lambda m: with_forward(m, lambda o: replace(o, hidden=o.hidden[:-1])),
            "gives hidden values 5; it declares 6",
        ),
        (lambda m: with_forward(m, lambda o: replace(o, caches={})), "gives caches of layers"),
        (lambda m: replace(m, states=(State("0.x", (4,)),)), "gives states"),
        (lambda m: replace(m, vocab_size=m.vocab_size + 1), "gives logits of width"),
        (lambda m: replace(m, transformers=None), "names no original to be compared with"),
        (
            lambda m: replace(m, reference=lambda tensors, config: None),
            "names two originals to be compared with",
        ),
        (
            lambda m: replace(
                m, weights=(*m.weights, Weight("extra", (1,), key=SCALAR, is_buffer=True))
            ),
            "`extra` of family `gemma4` is declared and not used",
        ),
    ],
    ids=[
        "undeclared",
        "not a matrix",
        "hidden",
        "caches",
        "states",
        "vocabulary",
        "no original",
        "two",
        "unused",
    ],
)
def test_a_family_that_contradicts_itself_is_refused(
    contradict: Callable[[Model], Model],
    message: str,
    gemma4_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = families.resolve
    monkeypatch.setattr(families, "resolve", lambda checkpoint: contradict(real(checkpoint)))
    with pytest.raises(FamilyError, match=re.escape(message)) as caught:
        pleexport.build(gemma4_checkpoint, tmp_path / "out", weight_dtype="fp32", verify=False)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []
