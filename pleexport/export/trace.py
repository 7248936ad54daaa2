"""Trace a model's forward function once, without weights, into an ExportedProgram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pleexport.contract import (
    ALL_TOKENS,
    CONTEXT_CAPACITY,
    LOGITS,
    LOGITS_OUTPUT,
    POSITION_IDS,
    TOKENS,
    WINDOW_CAPACITY,
    capacity_name,
    hidden_name,
    lookup_shape,
)
from pleexport.families.layers import Parameters
from pleexport.model import CacheDtype, GraphInputs, Model

# Sizes used while tracing; any that differ from each other and from 0 and 1 will do.
_EXAMPLE = {TOKENS: 5, ALL_TOKENS: 11, LOGITS: 3, CONTEXT_CAPACITY: 37, WINDOW_CAPACITY: 29}
LOGIT_POSITIONS = "logit_positions"
_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class GraphInput:
    """An argument of the traced program; dynamic dimensions by name."""

    name: str
    shape: list[int | str]
    dtype: torch.dtype


class _Dense(nn.Module):
    """A model's weights and forward function as a module.

    Arguments of `forward`, in order: one tensor for each table, position ids, the tensors of each
    cache, states, logit positions. Results: logits, the tensors of each cache, states, hidden
    values.
    """

    def __init__(self, model: Model, cache_dtype: CacheDtype) -> None:
        super().__init__()
        self._model = model
        self._cache_dtype = cache_dtype
        for weight in model.weights:
            _register(self, weight.name, torch.empty(weight.shape))

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        tables = self._model.tables
        rows = {table.graph_input: args[i] for i, table in enumerate(tables)}
        rest = iter(args[len(tables) + 1 : -1])
        caches = {
            cache.layer: tuple(next(rest) for _ in cache.buffers(self._cache_dtype))
            for cache in self._model.caches
        }
        inputs = GraphInputs(
            rows=rows,
            position_ids=args[len(tables)],
            caches=caches,
            states={state.name: next(rest) for state in self._model.states},
            logit_positions=args[-1],
        )
        outputs = self._model.forward(Parameters(dict(self.named_parameters())), inputs)
        written = [tensor for layer in caches for tensor in outputs.caches[layer]]
        states = [outputs.states[state.name] for state in self._model.states]
        return outputs.logits, *written, *states, *outputs.hidden


def inputs(model: Model, cache_dtype: CacheDtype) -> list[GraphInput]:
    """The arguments of the traced program."""
    caches = [
        GraphInput(
            buffer.input,
            [1, cache.heads, capacity_name(cache.window), buffer.width],
            _TORCH_DTYPES[buffer.dtype],
        )
        for cache in model.caches
        for buffer in cache.buffers(cache_dtype)
    ]
    return [
        *(GraphInput(t.graph_input, lookup_shape(t), torch.float32) for t in model.tables),
        GraphInput(POSITION_IDS, [1, TOKENS], torch.int64),
        *caches,
        *(GraphInput(s.input, [1, *s.shape], torch.float32) for s in model.states),
        GraphInput(LOGIT_POSITIONS, [LOGITS], torch.int64),
    ]


def output_names(model: Model, cache_dtype: CacheDtype) -> list[str]:
    """Names of the results of the traced program, hidden states last."""
    caches = [buffer.output for cache in model.caches for buffer in cache.buffers(cache_dtype)]
    states = [state.output for state in model.states]
    return [LOGITS_OUTPUT, *caches, *states, *(hidden_name(i) for i in range(model.num_layers))]


def trace(model: Model, cache_dtype: CacheDtype) -> torch.export.ExportedProgram:
    """Export a model with dynamic lengths; no weight is allocated.

    Source: torch.export's documentation of fake tensors.
    """
    dims = {name: torch.export.Dim(name, min=1) for name in _EXAMPLE}
    arguments = inputs(model, cache_dtype)
    dynamic = tuple(
        {i: dims[n] for i, n in enumerate(argument.shape) if isinstance(n, str)}
        for argument in arguments
    )
    with FakeTensorMode():
        args = tuple(
            torch.zeros([_EXAMPLE[n] if isinstance(n, str) else n for n in a.shape], dtype=a.dtype)
            for a in arguments
        )
        return torch.export.export(
            _Dense(model, cache_dtype).eval(), args, dynamic_shapes=(dynamic,), strict=False
        )


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
