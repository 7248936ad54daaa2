"""Operators as they are, where torch translates them so, and taken apart where it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from pleexport.backends.onnx import lower


class Usual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (4,), torch.full((4,), 1.5), 1e-3)
        seen = (normed > 0) & (normed < 1)
        return torch.where(seen, torch.square(normed), normed.double().float())


class ChangesInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        doubled[:, 1].add_(1)
        return doubled


class Rare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x) + torch.frac(x) + torch.special.entr(x.abs())


class Bits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ((x * 10).int() & torch.tensor(6, dtype=torch.int32)).float()


class WithoutEpsilon(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x * 1e-4, (4,))


@pytest.mark.parametrize(
    ("module", "is_taken_apart"),
    [(Usual, False), (ChangesInPlace, True), (Rare, True), (Bits, True), (WithoutEpsilon, True)],
)
def test_only_what_has_no_translation_is_taken_apart(
    module: type[nn.Module], is_taken_apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompose, calls = torch.export.ExportedProgram.run_decompositions, []

    def recorded(program: Any, *args: Any) -> Any:
        calls.append(program)
        return decompose(program, *args)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", recorded)
    x = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.5, 0.1, -0.3, 4.0]])
    program: Any = SimpleNamespace(
        exported=torch.export.export(module(), (x,)),
        arguments=[SimpleNamespace(name="x")],
        results=["y"],
        hidden=[],
    )
    exported = lower._export(program, lower._TRANSLATIONS)
    assert exported is not None
    assert bool(calls) == is_taken_apart
    graph = ir.to_proto(exported.model).SerializeToString()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, module()(x).numpy(), rtol=1e-5)


def test_no_operator_that_changes_its_input_is_translated_as_it_is() -> None:
    """Its translation would be that of one that changes nothing, and the change would be lost."""
    of_torch = _registration.ONNXRegistry.from_torchlib(opset_version=lower.OPSET).functions
    ours = lower._TRANSLATIONS | lower._ON_GPU | lower._OF_TORCH
    assert len(of_torch) > 400
    changed = [t for t in {*of_torch, *ours} if hasattr(t, "_schema") and t._schema.is_mutable]
    # It says that nobody asks for gradients, which a graph has none of.
    assert changed == [torch.ops.aten.detach_.default]
