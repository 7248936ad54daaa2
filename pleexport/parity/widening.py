"""Widen a model's weights to float32 where they are used, not as a whole.

`transformers` hands out a checkpoint's tensors as views of the mapped files. Widened as a whole
they would all be in memory, in twice the size of 16 bits. Here a lookup widens the rows that it
takes, a matrix is multiplied a block of its rows at a time, and what is small is widened once and
kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

# Weights that are kept in float32, the smallest first.
KEPT_BYTES = 64 << 20
# What is in float32 of a matrix at a time. Larger blocks are no faster, and the C library would ask
# the system for the memory of each anew.
BLOCK_BYTES = 16 << 20


def widen_where_used(model: nn.Module) -> None:
    """Make a model compute what it computes after `float()`, in little memory.

    Weights of other modules than lookups and linear layers are kept in float32 whatever their size.
    """
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)
    kept_bytes = 0
    for parameter, modules in sorted(users.items(), key=lambda item: item[0].numel()):
        if parameter.dtype == torch.float32:
            continue
        kept_bytes += 4 * parameter.numel()
        if kept_bytes <= KEPT_BYTES or not all(_use_is_known(m, parameter) for m in modules):
            parameter.data = parameter.data.float()
            continue
        for module in modules:
            stored = parameter.data
            if isinstance(module, nn.Embedding):
                look_up_with(module, _widened_rows(stored))
            elif isinstance(module, nn.Linear):
                multiply_with(module, _widened_rows(stored), shape=tuple(stored.shape))


def _use_is_known(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is looked up by id or multiplied with, and nothing else."""
    known = isinstance(module, nn.Embedding) or type(module) is nn.Linear
    return known and parameter is module.weight


def look_up_with(module: nn.Embedding, read: Callable[[Tensor], Tensor]) -> None:
    """Let a lookup take its rows from elsewhere, whatever else its forward function does.

    Args:
        read: rows `[n, width]` of n ids, in float32.
    """
    forward, stored = module.forward, module.weight.data
    module.padding_idx = None  # for gradients only, and it may lie beyond the rows

    def looked_up(ids: Tensor) -> Tensor:
        module.weight.data = read(ids.flatten())
        try:
            return forward(torch.arange(ids.numel()).view_as(ids))
        finally:
            module.weight.data = stored

    module.forward = looked_up  # type: ignore[assignment, method-assign]


def multiply_with(
    module: nn.Linear, read: Callable[[slice], Tensor], *, shape: tuple[int, ...]
) -> None:
    """Let a linear layer take its matrix from elsewhere, a block of outputs at a time.

    Args:
        read: rows of the matrix, in float32.
        shape: of the matrix.
    """
    (outputs, inputs), bias = shape, module.bias
    step = max(1, BLOCK_BYTES // (4 * inputs))

    def product(x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], outputs)
        for begin in range(0, outputs, step):
            block = slice(begin, begin + step)
            part = None if bias is None else bias[block]
            y[..., block] = functional.linear(x, read(block), part)
        return y

    module.forward = product  # type: ignore[assignment, method-assign]


def _widened_rows(stored: Tensor) -> Callable[[Tensor | slice], Tensor]:
    return lambda rows: stored[rows].float()
