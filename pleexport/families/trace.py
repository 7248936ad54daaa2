"""Trace a model's forward function once, without weights, into an ExportedProgram."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pleexport.contract import (
    ALL_TOKENS,
    CONTEXT_CAPACITY,
    LOGITS_OUTPUT,
    NUM_LOGITS,
    POSITION_IDS,
    TOKENS,
    WINDOW_CAPACITY,
    GraphContract,
    hidden_name,
)
from pleexport.dtypes import torch_name
from pleexport.errors import FamilyError
from pleexport.families.layers import Parameters
from pleexport.model import GraphInputs, GraphOutputs, Model
from pleexport.program import LOGIT_POSITIONS, Argument, Program

# Sizes used while tracing; any that differ from each other and from 0 and 1 will do.
_EXAMPLE = {TOKENS: 5, ALL_TOKENS: 11, NUM_LOGITS: 3, CONTEXT_CAPACITY: 37, WINDOW_CAPACITY: 29}


class _Dense(nn.Module):
    """A model's weights and forward function as a module.

    Arguments of `forward`, in order: one tensor for each table, position ids, the tensors of each
    cache, states, logit positions. Results: logits, the tensors of each cache, states, hidden
    values.
    """

    def __init__(self, model: Model, contract: GraphContract) -> None:
        super().__init__()
        self._model = model
        self._contract = contract
        for weight in model.weights:
            _register(self, weight.name, torch.empty(weight.shape))

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip((a.name for a in arguments(self._contract)), args, strict=True))
        caches: dict[int, tuple[Tensor, ...]] = {}
        capacities: dict[int, int] = {}
        for held in self._contract.caches:
            tensor = given[held.input]
            caches[held.layer] = (*caches.get(held.layer, ()), tensor)
            capacities[held.layer] = tensor.shape[held.slot_axis]
        outputs = self._model.forward(
            Parameters(dict(self.named_parameters())),
            GraphInputs(
                rows={lookup.name: given[lookup.name] for lookup in self._contract.lookup_inputs},
                position_ids=given[POSITION_IDS],
                caches=caches,
                capacities=capacities,
                windows={cache.layer: cache.window for cache in self._contract.caches},
                states={state.name: given[state.input] for state in self._model.states},
                logit_positions=given[LOGIT_POSITIONS],
            ),
        )
        _check_outputs(self._model, outputs)
        written = [tensor for layer in caches for tensor in outputs.caches[layer]]
        states = [outputs.states[state.name] for state in self._model.states]
        return outputs.logits, *written, *states, *outputs.hidden


def arguments(contract: GraphContract) -> list[Argument]:
    """The arguments of the traced program."""
    return [
        *(Argument(n.name, n.shape, "fp32") for n in contract.lookup_inputs),
        Argument(POSITION_IDS, [1, TOKENS], "int64"),
        *(Argument(c.input, c.shape, c.dtype) for c in contract.caches),
        *(Argument(s.input, [*s.shape], "fp32") for s in contract.states),
        Argument(LOGIT_POSITIONS, [NUM_LOGITS], "int64"),
    ]


def trace(model: Model, contract: GraphContract) -> Program:
    """Export a model with dynamic lengths; no weight is allocated.

    Source: torch.export's documentation of fake tensors.
    """
    bounds = contract.bounds
    dims = {name: torch.export.Dim(name, min=1, max=bounds.get(name)) for name in _EXAMPLE}
    given = arguments(contract)
    dynamic = tuple(
        {i: dims[n] for i, n in enumerate(argument.shape) if isinstance(n, str)}
        for argument in given
    )
    with FakeTensorMode():
        args = tuple(
            torch.zeros(
                [_EXAMPLE[n] if isinstance(n, str) else n for n in a.shape],
                dtype=getattr(torch, torch_name(a.dtype)),
            )
            for a in given
        )
        exported = torch.export.export(
            _Dense(model, contract).eval(), args, dynamic_shapes=(dynamic,), strict=False
        )
    results = [LOGITS_OUTPUT, *(held.output for held in contract.held)]
    hidden = [hidden_name(i) for i in range(contract.num_layers)]
    return Program(exported, contract, given, results, hidden)


def _check_outputs(model: Model, outputs: GraphOutputs) -> None:
    """Refuse results that are not those that the model declares.

    Raises:
        FamilyError: names what differs.
    """
    for what, got, declared in (
        ("caches of layers", set(outputs.caches), {cache.layer for cache in model.caches}),
        ("states", set(outputs.states), {state.name for state in model.states}),
        ("hidden values", len(outputs.hidden), model.num_layers),
        ("logits of width", outputs.logits.shape[-1], model.vocab_size),
    ):
        if got != declared:
            raise FamilyError(
                f"the forward function of family `{model.family}` gives {what} {got}; it declares "
                f"{declared}",
                hint="let the model's caches, states, layers and vocabulary follow one config",
            )


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
