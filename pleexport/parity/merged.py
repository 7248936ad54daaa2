"""Fill `transformers`' model with a checkpoint that adapters are merged into.

Small tensors are merged as a whole. Matrices and tables get stand-ins, which take no memory, and
are merged a block of outputs or a few rows at a time, where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pleexport.checkpoint.adapters.adapted import AdaptedCheckpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import torch_name
from pleexport.model import Table, Weight
from pleexport.parity.widening import look_up_with, multiply_with


def merged_when_used(matched: MatchedModel) -> Mapping[str, Tensor]:
    """By name, stand-ins for the tensors that `compute_merged` takes care of."""
    zero = torch.zeros((), dtype=getattr(torch, torch_name(matched.dtype)))
    items: list[Table | Weight] = [*_tables(matched), *_matrices(matched)]
    return {e.name: zero.expand(e.shape) for item in items for e in matched.entries(item)}


def compute_merged(model: Any, matched: MatchedModel) -> None:
    """Make the modules that got stand-ins compute with merged rows, in float32."""
    decoder = model.get_decoder()
    for table in _tables(matched):
        module = decoder.get_submodule(table.keys[0].removesuffix(".weight"))
        _empty(module)
        look_up_with(module, _rows(matched, table))
    for weight in _matrices(matched):
        stem, is_head = weight.name.removesuffix(".weight"), weight.precision == "head"
        module = model.get_output_embeddings() if is_head else decoder.get_submodule(stem)
        _empty(module)
        multiply_with(module, _block(matched, weight), shape=weight.shape)


def _rows(matched: MatchedModel, table: Table) -> Callable[[Tensor], Tensor]:
    return lambda ids: torch.from_numpy(matched.row_values(table, ids.numpy()))


def _block(matched: MatchedModel, weight: Weight) -> Callable[[slice], Tensor]:
    return lambda rows: torch.from_numpy(matched.read(weight, rows))


def _tables(matched: MatchedModel) -> list[Table]:
    return [table for table in matched.model.tables if _is_merged(matched, table)]


def _matrices(matched: MatchedModel) -> list[Weight]:
    """What linear layers multiply by; small matrices of other modules are merged as a whole."""
    linear = (w for w in matched.model.weights if w.precision != "full" and w.constant is None)
    return [weight for weight in linear if _is_merged(matched, weight)]


def _is_merged(matched: MatchedModel, item: Table | Weight) -> bool:
    checkpoint = matched.checkpoint
    if not isinstance(checkpoint, AdaptedCheckpoint):
        return False
    return all(entry.name in checkpoint.merged for entry in matched.entries(item))


def _empty(module: nn.Module) -> None:
    """Take the stand-in away, so that nothing computes with it."""
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
