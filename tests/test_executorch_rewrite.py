"""A traced program over ExecuTorch's operators, before anything is lowered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export.graph_signature import InputKind, OutputKind

from pleexport import families
from pleexport.backends import registry
from pleexport.backends.describe import describe
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import FamilyError, UnsupportedError
from pleexport.families.trace import trace
from pleexport.model import Model, Weight
from pleexport.program import Program

pytest.importorskip("executorch", reason="pip install 'pleexport[executorch]'")

from pleexport.backends.executorch.surroundings import undisturbed

with undisturbed():
    from pleexport.backends.executorch.attention import Attention
    from pleexport.backends.executorch.lower import drop_cache_outputs
    from pleexport.backends.executorch.rewrite import rewrite


def traced(model: Model) -> Program:
    return trace(model, describe(model, registry.load("executorch"), context=64))


@pytest.fixture(scope="module")
def gemma(gemma4_checkpoint: Path) -> tuple[MatchedModel, Program, Any]:
    """A model, its program, and that rewritten for logits."""
    source = Checkpoint(gemma4_checkpoint)
    model = families.resolve(source)
    matched, program = MatchedModel(model, source), traced(model)
    with undisturbed():
        return matched, program, rewrite(program, matched, results=["logits"])


def test_weights_are_names_and_operators_are_ours(gemma: Any) -> None:
    matched, program, rewritten = gemma
    kinds = Counter(spec.kind for spec in rewritten.graph_signature.input_specs)
    assert kinds[InputKind.PARAMETER] == kinds[InputKind.BUFFER] == 0
    assert kinds[InputKind.USER_INPUT] == len(program.arguments)
    # The control: the traced program has every weight as a parameter.
    before = Counter(spec.kind for spec in program.exported.graph_signature.input_specs)
    assert before[InputKind.PARAMETER] == len(matched.model.weights)

    targets = [str(node.target) for node in rewritten.graph.nodes if node.op == "call_function"]
    replaced = ("aten.linear", "aten.rms_norm", "aten.gelu", "aten.tanh", "pleexport.")
    assert not [target for target in targets if target.startswith(replaced)]
    counts = Counter(targets)
    linears = sum(n.name.startswith("linear") for n in program.exported.graph.nodes)
    assert counts["pleexport_xnnpack.linear.default"] == linears
    # Three layers own caches, of keys and values; one of them sees the whole context.
    assert counts["llama.update_cache.default"] == 2
    assert counts["llama.update_cache_with_indices.default"] == 4
    # Layers that share a mask share it once made: of all tokens, and of those with logits.
    assert counts["aten.where.ScalarOther"] + counts["aten.where.Scalar"] == 2


def test_hidden_values_are_results_like_others(gemma: Any) -> None:
    matched, program, _ = gemma
    with undisturbed():
        hidden = rewrite(program, matched, results=program.hidden)
    assert len(hidden.graph_signature.user_outputs) == 6


def test_written_caches_are_no_outputs(gemma: Any) -> None:
    with undisturbed():
        functional = gemma[2].run_decompositions({})
    kinds = [spec.kind for spec in functional.graph_signature.output_specs]
    assert kinds.count(OutputKind.USER_INPUT_MUTATION) == 6
    drop_cache_outputs(functional)
    kinds = [spec.kind for spec in functional.graph_signature.output_specs]
    assert kinds == [OutputKind.USER_OUTPUT]
    (results,) = functional.graph.output_node().args
    assert len(results) == 1


def test_a_weight_that_nothing_uses_is_named(gemma: Any) -> None:
    matched, _, _ = gemma
    spare = Weight("spare", (3,), constant=np.zeros(3, np.float32))
    model = replace(matched.model, weights=(*matched.model.weights, spare))
    with (
        pytest.raises(FamilyError, match="weight `spare` of family `gemma4` is declared and not"),
        undisturbed(),
    ):
        rewrite(traced(model), MatchedModel(model, matched.checkpoint), results=["logits"])


def test_a_matrix_that_is_not_for_linear_layers_is_named(gemma: Any) -> None:
    matched, _, _ = gemma
    name = "rotary_emb.full_attention_16"
    weights = tuple(
        replace(w, precision="quantizable") if w.name == name else w for w in matched.model.weights
    )
    model = replace(matched.model, weights=weights)
    with (
        pytest.raises(FamilyError, match=f"weight `{name}` has precision `quantizable`"),
        undisturbed(),
    ):
        rewrite(traced(model), MatchedModel(model, matched.checkpoint), results=["logits"])


def test_a_softcap_in_attention_is_refused() -> None:
    attention = Attention(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    query, cache = torch.zeros(1, 2, 1, 4), torch.zeros(1, 8, 1, 4)
    ids, held = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="no softcap"):
        attention.attend_context(query, cache, cache, ids, held, softcap=30.0, window=0)
