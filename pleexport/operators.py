"""Operators of our own, defined in torch; each backend maps them to what its runtime has.

A family's mathematics is ATen and these. They are opaque to `torch.export`, so that a backend meets
one node where its runtime has one operator. The layout of a cache is the backend's choice: shapes
of results do not depend on it. The definitions here are for `[B, K, C, D]`.

Shape suffixes: B = 1 sequence, T tokens, Q tokens that attend, N heads, K heads of a cache, C slots
of a cache, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils import _pytree as pytree

# A slot that holds nothing, or nothing that may be seen.
_HIDDEN = -torch.inf


def _custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make an operator of ours of a definition; its gradient is the definition's.

    Gradients are for choosing dtypes by a text; a program that is traced has none.
    """

    def make(definition: Callable[..., Any]) -> CustomOpDef:
        operator = torch.library.custom_op(name, mutates_args=())(definition)

        def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.given = inputs

        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return _gradients(definition, ctx.given, gradients)

        operator.register_autograd(backward, setup_context=keep_inputs)
        return operator

    return make


def _gradients(
    definition: Callable[..., Any], given: tuple[Any, ...], gradients: Sequence[Tensor | None]
) -> Any:
    """By input, the gradient, found by computing once more; None for what has none."""
    flat, form = pytree.tree_flatten(given)
    moving = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()]
    for i in moving:
        flat[i] = flat[i].detach().requires_grad_()
    with torch.enable_grad():
        outputs = pytree.tree_leaves(definition(*pytree.tree_unflatten(flat, form)))
    pairs = zip(outputs, gradients, strict=True)
    used = [(out, grad) for out, grad in pairs if grad is not None and out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in used],
        [flat[i] for i in moving],
        [grad for _, grad in used],
        allow_unused=True,
    )
    by_place = dict(zip(moving, found, strict=True))
    return tuple(pytree.tree_unflatten([by_place.get(i) for i in range(len(flat))], form))


@_custom_op("pleexport::rotate")
def rotate(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of N heads; element i pairs with i + D/2. Source: arXiv 2104.09864.

    Args:
        cos, sin: `[B, T, D / 2]`.
    """
    first, second = x_BTND.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@rotate.register_fake
def _(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x_BTND)


@_custom_op("pleexport::write_cache")
def write_cache(cache: Tensor, new_BTKD: Tensor, slots_BT: Tensor) -> Tensor:
    """A tensor of a cache with T new entries in consecutive slots, wrapping around at its end.

    A runtime writes in place: input and output share a buffer.
    """
    new = new_BTKD.transpose(1, 2)
    return cache.scatter(2, slots_BT[:, None, :, None].expand_as(new), new)


@write_cache.register_fake
def _(cache: Tensor, new_BTKD: Tensor, slots_BT: Tensor) -> Tensor:
    return torch.empty_like(cache)


@_custom_op("pleexport::attend_window")
def attend_window(query_BQND: Tensor, keys: Tensor, values: Tensor, bias_BQC: Tensor) -> Tensor:
    """`[B, Q, N * D]`: softmax(q k + bias) v with scale 1; K key heads serve N query heads.

    Args:
        keys, values: a float32 cache whose slots are few.
        bias_BQC: see `attention_bias`.
    """
    return attend(query_BQND, keys, values, bias_BQC)


@attend_window.register_fake
def _(query_BQND: Tensor, keys: Tensor, values: Tensor, bias_BQC: Tensor) -> Tensor:
    return query_BQND.new_empty(*query_BQND.shape[:2], query_BQND.shape[2] * values.shape[3])


@_custom_op("pleexport::attend_context")
def attend_context(
    query_BQND: Tensor,
    cache: Sequence[Tensor],
    query_ids_BQ: Tensor,
    held_C: Tensor,
    block: int,
    softcap: float,
    window: int,
) -> Tensor:
    """`[B, Q, N * D]`: as `attend_window`, for a cache of a whole context.

    Args:
        cache: keys and values; for int8 also the scale of each vector.
        query_ids_BQ: positions of the queries, consecutive.
        held_C: the position in each slot, negative for none.
        block: the number of slots is a multiple of it. A runtime may take so many at a time, that
            no scores of a whole context are in memory.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        window: positions that a query sees, its own included; 0 for all.
    """
    keys, values = (x.float() for x in cache[:2])
    if len(cache) > 2:
        keys, values = keys * cache[2], values * cache[3]
    bias = attention_bias(query_ids_BQ, held_C, window=window or None)
    return attend(query_BQND, keys, values, bias, softcap=softcap).clone()


@attend_context.register_fake
def _(
    query_BQND: Tensor,
    cache: Sequence[Tensor],
    query_ids_BQ: Tensor,
    held_C: Tensor,
    block: int,
    softcap: float,
    window: int,
) -> Tensor:
    return query_BQND.new_empty(*query_BQND.shape[:2], query_BQND.shape[2] * cache[1].shape[3])


@_custom_op("pleexport::linear_in_steps")
def linear_in_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_step: Tensor | None,
    output_step: Tensor | None,
) -> Tensor:
    """`x @ weight.T + bias`, with inputs and outputs in steps as 8 bits hold them.

    It is one operator, because a tracer takes as long for each, however little it computes.

    Args:
        input_step, output_step: scalars above 0; None where nothing is rounded.
    Source: transformers `integrations/gemma_quant.py`, `QuantizedLinear`.
    """
    x = x if input_step is None else in_steps(x, input_step)
    outputs = torch.nn.functional.linear(x, weight, bias)
    return outputs if output_step is None else in_steps(outputs, output_step)


@linear_in_steps.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_step: Tensor | None,
    output_step: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_custom_op("pleexport::wkv7")
def wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-7: S = S (diag(exp(log_w)) + a b^T) + v k^T; y = S r.

    Args:
        r, log_w, k, v, a, b: `[1, T, heads, N]`.
        state: S before the first token, `[1, heads, N, N]`, a row for each value.
    Returns:
        y `[1, T, heads, N]`, and S after the last token.
    Source: arXiv 2503.14456.
    """
    outputs = []
    for t in range(r.shape[1]):
        row = [x[:, t].unsqueeze(-2) for x in (log_w, k, b)]
        u = state @ a[:, t].unsqueeze(-1)
        state = state * row[0].exp() + u @ row[2] + v[:, t].unsqueeze(-1) @ row[1]
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), state.clone()


@wkv7.register_fake
def _(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(r), torch.empty_like(state)


def in_steps(x: Tensor, step: Tensor) -> Tensor:
    """x in the 256 steps around 0 that 8 bits hold; halves go to the even step.

    Source: transformers `integrations/gemma_quant.py`, `apply_srq`.
    """
    return torch.clamp(torch.round(x / step), -128.0, 127.0) * step


def attention_bias(query_ids_BQ: Tensor, held_C: Tensor, *, window: int | None) -> Tensor:
    """`[B, Q, C]`: 0 for a visible slot, else -inf.

    A query sees positions up to its own, and no further back than its window.
    """
    query_BQ1 = query_ids_BQ.unsqueeze(2)
    visible = (held_C >= 0) & (held_C <= query_BQ1)
    if window is not None:
        visible = visible & (held_C > query_BQ1 - window)
    return torch.where(visible, 0.0, _HIDDEN)


def attend(
    query_BQND: Tensor,
    keys_BKCD: Tensor,
    values_BKCD: Tensor,
    bias_BQC: Tensor,
    *,
    softcap: float = 0.0,
) -> Tensor:
    """`[B, Q, N * D]`: softmax(q k + bias) v with scale 1, written out.

    The query heads of a key head are rows of one product. ONNX's `Attention` multiplies head by
    head, which takes three times as long for one token and a long cache.

    Args:
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
    """
    tokens, size, shared = query_BQND.shape[1], query_BQND.shape[3], keys_BKCD.shape[1]
    repeats = query_BQND.shape[2] // shared
    grouped = query_BQND.reshape(1, tokens, shared, repeats, size)
    if shared > 1:
        grouped = grouped.transpose(1, 2)
    scores = grouped.reshape(1, shared, -1, size) @ keys_BKCD.transpose(2, 3)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    bias = bias_BQC[:, None, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)
    out = torch.softmax(scores + bias, dim=-1) @ values_BKCD
    if shared > 1:
        out = out.reshape(1, shared, tokens, -1, values_BKCD.shape[3]).transpose(1, 2)
    return out.reshape(1, tokens, -1)
