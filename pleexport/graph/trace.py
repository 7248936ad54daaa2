"""Trace a model's forward function once, without weights, into an ExportedProgram."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pleexport.families.base import GraphInputs, Model
from pleexport.graph.contract import (
    CONTEXT_CAPACITY,
    LOGITS,
    TOKENS,
    WINDOW_CAPACITY,
    capacity_name,
    hidden_name,
    lookup_shape,
)
from pleexport.layers import Parameters

# Sizes used while tracing; any that differ from each other and from 0 and 1 will do.
_EXAMPLE = {TOKENS: 5, LOGITS: 3, CONTEXT_CAPACITY: 37, WINDOW_CAPACITY: 29}
LOGIT_POSITIONS = "logit_positions"


class _Dense(nn.Module):
    """A model's weights and forward function as a module.

    Arguments of `forward`, in order: one tensor for each table, position ids, keys and values of
    each cache, logit positions. Results: logits, keys and values of each cache, hidden states.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        for weight in model.weights:
            _register(self, weight.name, torch.empty(weight.shape))

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        tables, caches = self._model.tables, self._model.caches
        rows = {table.graph_input: args[i] for i, table in enumerate(tables)}
        rest = args[len(tables) + 1 : -1]
        inputs = GraphInputs(
            rows=rows,
            position_ids=args[len(tables)],
            caches={c.layer: (rest[2 * i], rest[2 * i + 1]) for i, c in enumerate(caches)},
            logit_positions=args[-1],
        )
        outputs = self._model.forward(Parameters(dict(self.named_parameters())), inputs)
        written = [tensor for c in caches for tensor in outputs.caches[c.layer]]
        return outputs.logits, *written, *outputs.hidden


def input_shapes(model: Model) -> list[list[int | str]]:
    """Shapes of the arguments of the traced program; dynamic dimensions by name."""
    caches: list[list[int | str]] = [
        [1, cache.heads, capacity_name(cache.window), cache.head_dim]
        for cache in model.caches
        for _ in range(2)
    ]
    return [*(lookup_shape(table) for table in model.tables), [1, TOKENS], *caches, [LOGITS]]


def input_names(model: Model) -> list[str]:
    """Names of the arguments of the traced program."""
    caches = [name for cache in model.caches for name in cache.inputs]
    return [t.graph_input for t in model.tables] + ["position_ids", *caches, LOGIT_POSITIONS]


def output_names(model: Model) -> list[str]:
    """Names of the results of the traced program, hidden states last."""
    caches = [name for cache in model.caches for name in cache.outputs]
    return ["logits", *caches, *(hidden_name(i) for i in range(model.num_layers))]


def trace(model: Model) -> torch.export.ExportedProgram:
    """Export a model with dynamic lengths; no weight is allocated.

    Source: torch.export's documentation of fake tensors.
    """
    dims = {name: torch.export.Dim(name, min=1) for name in _EXAMPLE}
    shapes = input_shapes(model)
    integers = ("position_ids", LOGIT_POSITIONS)
    dtypes = [torch.int64 if n in integers else torch.float32 for n in input_names(model)]
    dynamic = tuple(
        {i: dims[n] for i, n in enumerate(shape) if isinstance(n, str)} for shape in shapes
    )
    with FakeTensorMode():
        args = tuple(
            torch.zeros([_EXAMPLE[n] if isinstance(n, str) else n for n in shape], dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return torch.export.export(
            _Dense(model).eval(), args, dynamic_shapes=(dynamic,), strict=False
        )


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
