"""Fill `transformers`' model with what a checkpoint's codes stand for, where they are used.

`transformers` needs a package of its own to load codes of compressed-tensors, and would hold all
of their values in memory. Its model gets stand-ins in their place, which take no memory, and reads
the values a block of outputs or a few rows at a time. Everything else is computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.gemma_quant import apply_srq

from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.quantized import read_quantization
from pleexport.dtypes import torch_name
from pleexport.model import Table, Weight
from pleexport.parity.widening import look_up_with, multiply_with


def stand_ins(matched: MatchedModel) -> dict[str, Tensor]:
    """Shapes by name, of the matrices and tables that the checkpoint holds in codes.

    Each is one zero, seen as many times as the shape asks for.
    """
    zero = torch.zeros((), dtype=getattr(torch, torch_name(matched.dtype)))
    shapes: dict[str, tuple[int, ...]] = {}
    for table in matched.model.tables:
        if table.codes:
            shapes[_name(matched, table)] = (table.rows, table.row_width)
    for weight in matched.model.weights:
        if weight.codes:
            shapes[_name(matched, weight)] = weight.shape
    return {name: zero.expand(shape) for name, shape in shapes.items()}


def compute_with_codes(model: Any, matched: MatchedModel) -> None:
    """Make the modules that got stand-ins compute with what the codes stand for, in float32."""
    decoder = model.get_decoder()
    for table in matched.model.tables:
        if table.codes:
            module = decoder.get_submodule(table.keys[0].removesuffix(".weight"))
            _empty(module)
            look_up_with(module, _rows(matched, table))
    rules = read_quantization(matched.checkpoint.config)
    assert rules is not None
    for weight in matched.model.weights:
        if not weight.codes:
            continue
        stem = weight.source_key.removesuffix(".weight")
        is_head = weight.precision == "head"
        module = model.get_output_embeddings() if is_head else decoder.get_submodule(stem)
        _empty(module)
        multiply_with(module, _block(matched, weight), shape=weight.shape)
        if weight.key is not None:
            continue  # a tied head has no scales of its own
        whole = _name(matched, weight).removesuffix(".weight")
        for scale in rules.activation_scales(whole, weight):
            _, _, key = scale.source_key.rpartition(".")
            value = matched.checkpoint.array(f"{whole}.{key}").astype(np.float32).reshape(())
            _, _, name = scale.name.rpartition(".")
            module.register_parameter(
                name, nn.Parameter(torch.from_numpy(value), requires_grad=False)
            )
            _round(module, name)


def _name(matched: MatchedModel, item: Table | Weight) -> str:
    """What the checkpoint would call it if it held numbers."""
    return matched.entries(item)[0].name.removesuffix("_packed")


def _empty(module: nn.Module) -> None:
    """Take the stand-in away, so that nothing computes with it."""
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def _rows(matched: MatchedModel, table: Table) -> Callable[[Tensor], Tensor]:
    return lambda ids: torch.from_numpy(matched.row_values(table, ids.numpy()))


def _block(matched: MatchedModel, weight: Weight) -> Callable[[slice], Tensor]:
    return lambda rows: torch.from_numpy(matched.read(weight, rows))


def _round(module: nn.Module, name: str) -> None:
    """Round a module's inputs or outputs to 8 bits, by its parameter of that name."""
    forward, scale = module.forward, module.get_parameter(name)
    of_inputs = name.startswith("input")

    def rounded(x: Tensor) -> Tensor:
        if of_inputs:
            x = apply_srq(x, scale)
        y: Tensor = forward(x)
        if not of_inputs:
            y = apply_srq(y, scale)
        return y

    module.forward = rounded
