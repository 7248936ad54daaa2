"""A traced program over the operators that XNNPACK and ExecuTorch have, traced once more.

The traced program is interpreted node by node, with a rule for each operator that has a better form
here, and every other one as it is. So shapes, constants and control flow are the tracer's own work,
not edits of a graph. Weights are names: they never become values, unless an operator without a rule
takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

import pleexport.operators  # noqa: F401  registers torch.ops.pleexport
from pleexport.backends.executorch.attention import Attention, HeldCache
from pleexport.backends.executorch.operators import operator
from pleexport.checkpoint.matching import MatchedModel
from pleexport.contract import POSITION_IDS
from pleexport.model import Weight, misused_weight, unused_weight
from pleexport.program import LOGIT_POSITIONS, Program

aten, ours = torch.ops.aten, torch.ops.pleexport
# Sizes used while tracing, smallest bound first; any that differ from each other and from 0 and 1
# will do.
_EXAMPLES = (3, 5, 29, 37)


@dataclass(frozen=True)
class _Ones:
    """A vector of ones: the weight of a norm that has none."""

    size: list[int]


def rewrite(program: Program, matched: MatchedModel, *, results: list[str]) -> ExportedProgram:
    """A program of the named results alone, which writes its caches in place.

    Its inputs are the arguments of the traced program, in the same order.

    Args:
        results: some of `program.results` and `program.hidden`.
    Raises:
        FamilyError: declared weights and the traced function contradict each other.
        UnsupportedError: attention of a kind that ExecuTorch lacks.
    """
    module = _Rewritten(program, matched, results)
    bounds = program.contract.bounds
    names = {size for a in program.arguments for size in a.shape if isinstance(size, str)}
    examples = dict(zip(sorted(names, key=lambda n: (bounds[n], n)), _EXAMPLES, strict=False))
    dims = {name: Dim(name, min=1, max=bounds[name]) for name in names}
    args, dynamic = [], []
    for argument in program.arguments:
        sizes = [examples[n] if isinstance(n, str) else n for n in argument.shape]
        dtype = torch.int64 if argument.dtype == "int64" else torch.float32
        args.append(torch.zeros(sizes, dtype=dtype))
        dynamic.append({i: dims[n] for i, n in enumerate(argument.shape) if isinstance(n, str)})
    with torch.no_grad():
        exported = torch.export.export(
            module.eval(), tuple(args), dynamic_shapes=(tuple(dynamic),), strict=False
        )
    for weight in matched.model.weights:
        if weight.name not in module.used:
            raise unused_weight(weight, matched.model.family)
    return exported


class _Rewritten(nn.Module):
    """Interprets a traced program.

    Attributes:
        used: names of the weights that it met.
    """

    def __init__(self, program: Program, matched: MatchedModel, results: list[str]) -> None:
        super().__init__()
        self._program = program
        self._matched = matched
        self._results = results
        self.used: set[str] = set()

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip((a.name for a in self._program.arguments), args, strict=True))
        interpreter = _Interpreter(self._program, self._matched, given)
        values = interpreter.run(*self._placeholders(given))
        self.used |= interpreter.used
        named = dict(zip([*self._program.results, *self._program.hidden], values, strict=True))
        return tuple(named[name] for name in self._results)

    def _placeholders(self, given: dict[str, Tensor]) -> list[Any]:
        """A value for each placeholder of the traced program."""
        weights = {weight.name: weight for weight in self._matched.model.weights}
        caches = {cache.input: cache for cache in self._program.contract.caches}
        arguments, values = iter(given.items()), list[Any]()
        for spec in self._program.exported.graph_signature.input_specs:
            if spec.kind == InputKind.PARAMETER:
                assert spec.target is not None
                values.append(weights[spec.target])
            elif spec.kind == InputKind.USER_INPUT:
                name, tensor = next(arguments)
                cache = caches.get(name)
                values.append(tensor if cache is None else HeldCache(tensor, cache.window))
            else:
                values.append(self._program.exported.constants[spec.target])
        return values


class _Interpreter(fx.Interpreter):
    """One pass through a traced program."""

    def __init__(
        self, program: Program, matched: MatchedModel, given: Mapping[str, Tensor]
    ) -> None:
        super().__init__(program.exported.graph_module)
        self._matched = matched
        self.attention = Attention(given[POSITION_IDS], given[LOGIT_POSITIONS])
        self.used: set[str] = set()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(target)
        result = NotImplemented if rule is None else rule(self, *args, **kwargs)
        if result is NotImplemented:
            args, kwargs = fx.node.map_aggregate((args, kwargs), self._plain)
            return super().call_function(target, args, kwargs)
        return result

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fx.node.map_aggregate(args[0], self._plain)

    def name_of(self, weight: Weight | None) -> str:
        """What an operator calls a weight by; empty for none."""
        if weight is None:
            return ""
        self.used.add(weight.name)
        return weight.name

    def _plain(self, value: Any) -> Any:
        """A value as an operator without a rule takes it."""
        if isinstance(value, HeldCache):
            return value.tensor
        if isinstance(value, _Ones):
            return torch.ones(value.size)
        if not isinstance(value, Weight):
            return value
        if value.precision != "full":
            raise misused_weight(value, taker="something else than a linear layer")
        self.used.add(value.name)
        return torch.tensor(self._matched.values(value))


_Rule = Callable[..., Any]
_RULES: dict[Any, _Rule] = {}


def _rule(*targets: Any) -> Callable[[_Rule], _Rule]:
    """Register what stands for some operators. NotImplemented leaves a node as it is."""

    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32


@_rule(aten._assert_tensor_metadata.default)
def _checked(self: _Interpreter, *_: Any, **__: Any) -> None:
    """True of what was traced, and so of this."""


@_rule(aten.to.dtype)
def _to(self: _Interpreter, x: Any, dtype: torch.dtype, *rest: Any) -> Any:
    return x if isinstance(x, Tensor) and x.dtype == dtype else NotImplemented


@_rule(aten.ones.default)
def _ones(self: _Interpreter, size: list[int], **_: Any) -> Any:
    return _Ones(size) if all(isinstance(n, int) for n in size) else NotImplemented


@_rule(aten.linear.default)
def _linear(self: _Interpreter, x: Tensor, weight: Weight, bias: Weight | None = None) -> Any:
    return operator("linear")(x, self.name_of(weight), self.name_of(bias), weight.shape[0])


@_rule(ours.linear_in_steps.default)
def _linear_in_steps(
    self: _Interpreter,
    x: Tensor,
    weight: Weight,
    bias: Weight | None,
    input_step: Weight | None,
    output_step: Weight | None,
) -> Any:
    def in_steps(values: Tensor, step: Weight | None) -> Any:
        return values if step is None else operator("round_activation")(values, self.name_of(step))

    return in_steps(_linear(self, in_steps(x, input_step), weight, bias), output_step)


@_rule(aten.rms_norm.default)
def _rms_norm(
    self: _Interpreter, x: Tensor, shape: list[int], weight: Any = None, eps: float = 0.0
) -> Any:
    named = weight if isinstance(weight, Weight) else None
    return operator("rms_norm")(x, self.name_of(named), eps)


@_rule(aten.mul.Tensor)
def _mul(self: _Interpreter, x: Any, y: Any) -> Any:
    if not _is_float(x):
        return NotImplemented
    if isinstance(y, Weight) and torch.broadcast_shapes(x.shape, y.shape) == x.shape:
        return operator("multiply_weight")(x, self.name_of(y))
    return operator("scale")(x, float(y)) if isinstance(y, int | float) else NotImplemented


@_rule(aten.div.Tensor)
def _div(self: _Interpreter, x: Any, y: Any) -> Any:
    return _mul(self, x, 1 / y) if isinstance(y, int | float) else NotImplemented


@_rule(aten.add.Tensor)
def _add(self: _Interpreter, x: Any, y: Any) -> Any:
    if _is_float(x) and isinstance(y, int | float):
        return operator("shift")(x, float(y))
    return NotImplemented


@_rule(aten.gelu.default)
def _gelu(self: _Interpreter, x: Tensor, *, approximate: str = "none") -> Any:
    return operator("activate")(x, "gelu" if approximate == "none" else "gelu_tanh")


def _activation(name: str) -> _Rule:
    return lambda self, x: operator("activate")(x, name)


for _name in ("silu", "relu", "sigmoid", "tanh", "square", "sqrt"):
    _rule(getattr(aten, _name).default)(_activation(_name))


@_rule(aten.mean.dim)
def _mean(self: _Interpreter, x: Tensor, dims: list[int], keepdim: bool = False) -> Any:
    last = dims in ([-1], [x.dim() - 1])
    return operator("mean")(x) if last and keepdim else NotImplemented


@_rule(aten.select.int)
def _select(self: _Interpreter, x: Tensor, axis: int, index: int) -> Any:
    layers = _is_float(x) and x.dim() == 4 and axis == 2 and index >= 0
    return operator("pick")(x, index) if layers else NotImplemented


@_rule(aten.reshape.default)
def _reshape(self: _Interpreter, x: Tensor, shape: list[Any]) -> Any:
    if _is_float(x) and x.dim() == 3 and len(shape) == 4:
        heads, size = shape[2:]
        if isinstance(heads, int) and isinstance(size, int) and heads * size == x.shape[2]:
            return operator("split")(x, heads, size)
    return NotImplemented


@_rule(ours.rotate.default)
def _rotate(self: _Interpreter, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return operator("rotate")(x, cos, sin)


@_rule(aten.index_select.default)
def _index_select(self: _Interpreter, x: Tensor, axis: int, index: Tensor) -> Any:
    return self.attention.narrowed(x, axis, index)


@_rule(ours.write_cache.default)
def _write_cache(self: _Interpreter, cache: HeldCache, new: Tensor, slots: Tensor) -> Any:
    return self.attention.write(cache, new, slots)


@_rule(ours.attend_window.default)
def _attend_window(
    self: _Interpreter, query: Tensor, keys: HeldCache, values: HeldCache, bias: Tensor
) -> Any:
    return self.attention.attend_window(query, keys.tensor, values.tensor, bias)


@_rule(ours.attend_context.default)
def _attend_context(
    self: _Interpreter,
    query: Tensor,
    cache: list[HeldCache],
    query_ids: Tensor,
    held: Tensor,
    block: int,
    softcap: float = 0.0,
    window: int = 0,
) -> Any:
    keys, values = (part.tensor for part in cache)
    return self.attention.attend_context(
        query, keys, values, query_ids, held, softcap=softcap, window=window
    )
