"""Operators that stay opaque until XNNPACK's serializer meets them; `visitors` says what they are.

Weights never enter the program: an operator carries the weight's name, and its visitor asks for the
bytes. Shapes are all that is defined here, so none of these can be run in torch.

Shape suffixes: B = 1 sequence, T tokens, L layers, P width of a per-layer vector, N heads, D size
of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library

NAMESPACE = "pleexport_xnnpack"
# Kept for as long as the process: the operators go with it.
_LIBRARY = Library(NAMESPACE, "DEF")
OPERATORS: list[str] = []


def _define(schema: str, shape_of: Callable[..., Tensor]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, shape_of, "Meta")
    OPERATORS.append(name)


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# x @ weight.T, plus the bias where its name is not empty.
_define(
    "linear(Tensor x, str weight, str bias, int outputs) -> Tensor",
    lambda x, weight, bias, outputs: x.new_empty(*x.shape[:-1], outputs),
)
# RMS norm over the last axis, times the weight where its name is not empty.
_define("rms_norm(Tensor x, str weight, float eps) -> Tensor", _like)
# Mean over the last axis, which stays with size 1.
_define("mean(Tensor x) -> Tensor", lambda x: x.new_empty(*x.shape[:-1], 1))
_define("multiply_weight(Tensor x, str weight) -> Tensor", _like)
# In steps of a scale of the checkpoint, -128 to 127 of them.
_define("round_activation(Tensor x, str scale) -> Tensor", _like)
_define("rotate(Tensor x_BTND, Tensor cos, Tensor sin) -> Tensor", _like)
_define("activate(Tensor x, str name) -> Tensor", _like)
_define("scale(Tensor x, float factor) -> Tensor", _like)
_define("shift(Tensor x, float term) -> Tensor", _like)
_define(
    "pick(Tensor x_BTLP, int layer) -> Tensor", lambda x, i: x.new_empty(*x.shape[:2], x.shape[3])
)
_define(
    "split(Tensor x, int heads, int size) -> Tensor",
    lambda x, heads, size: x.new_empty(*x.shape[:2], heads, size),
)
_define(
    "merge(Tensor x_BTND) -> Tensor",
    lambda x: x.new_empty(*x.shape[:2], x.shape[2] * x.shape[3]),
)


def operator(name: str) -> Callable[..., Tensor]:
    """The operator of that name, to be called with tensors."""
    found: Callable[..., Tensor] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found
