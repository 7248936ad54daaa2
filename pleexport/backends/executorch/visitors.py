"""What XNNPACK computes for each operator of `operators`, and which nodes a delegate takes.

A visitor writes the nodes of XNNPACK's own graph. Sizes that are not known are given as 0 in
reshapes and slices, which means "what is there"; the sizes of values are upper bounds.

Shape suffixes: B = 1 sequence, T tokens, N heads, D size of a head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch.fx
from executorch.backends.xnnpack.operators.node_visitor import (
    NodeVisitor,
    register_node_visitor,
)
from executorch.backends.xnnpack.partition.config import generic_node_configs as generic
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX, XNN_INVALID_VALUE_ID
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.sym_util import eval_upper_bound
from numpy.typing import ArrayLike

from pleexport.backends.executorch.operators import NAMESPACE, OPERATORS
from pleexport.backends.executorch.store import StoredMatrix, active_store

_FLOAT = xnn.XNNDatatype.xnn_datatype_fp32
_Dims = list[int]


def _upper_bounds(node: torch.fx.Node) -> _Dims:
    """Of the sizes of a node's result."""
    return [int(eval_upper_bound(size)) for size in node.meta["val"].shape]


@dataclass
class _Shared:
    """Values of one delegate that several of its nodes take, by what they are."""

    constants: dict[str, int] = field(default_factory=dict)
    quantized: dict[int, int] = field(default_factory=dict)
    steps: dict[tuple[torch.fx.Node, float], int] = field(default_factory=dict)
    angles: dict[int, int] = field(default_factory=dict)


@dataclass
class _Sheet:
    """XNNPACK's graph of one delegate, as a visitor writes it; values are their ids.

    Attributes:
        node: the node that is visited.
    """

    visitor: NodeVisitor
    node: torch.fx.Node
    graph: xnn.XNNGraph
    ids: dict[torch.fx.Node, int]
    handle: int

    @property
    def shared(self) -> _Shared:
        # Kept by the graph itself: the id of one that is gone is given to the next.
        found: _Shared = vars(self.graph).setdefault("_pleexport_shared", _Shared())
        return found

    def input(self, index: int) -> int:
        """The node's argument."""
        argument = self.node.args[index]
        assert isinstance(argument, torch.fx.Node)
        self.visitor.define_tensor(argument, self.graph, self.ids)
        return self.ids[argument]

    def dims(self, index: int | None = None) -> _Dims:
        """Upper bounds of the sizes of an argument, or of the result."""
        node = self.node if index is None else self.node.args[index]
        assert isinstance(node, torch.fx.Node)
        return _upper_bounds(node)

    def output(self) -> int:
        """The node's result."""
        self.visitor.define_tensor(self.node, self.graph, self.ids)
        return self.ids[self.node]

    def value(self, dims: Sequence[int]) -> int:
        """A value in between."""
        return self._add(dims, _FLOAT, buffer=0)

    def quantized(self, dims: Sequence[int], scale: float | None = None) -> int:
        """A value in between of 8 bits, with one scale, or one that each token is given."""
        if scale is None:
            dtype = xnn.XNNDatatype.xnn_datatype_qdint8
            by_token = xnn.PerTokenDynamicQuant(num_nonbatch_dims=1)
            return self._add(dims, dtype, buffer=0, quant=by_token)
        dtype = xnn.XNNDatatype.xnn_datatype_qint8
        return self._add(dims, dtype, buffer=0, quant=xnn.PerTensorQuant(scale, 0))

    def steps(self, node: torch.fx.Node, scale: float) -> int:
        """The values of a node in 8 bits, rounded to steps of a scale: half to even, clipped."""
        steps = self.shared.steps
        if (node, scale) not in steps:
            self.visitor.define_tensor(node, self.graph, self.ids)
            steps[node, scale] = self.quantized(_upper_bounds(node), scale)
            self.emit(xnn.XNNConvert, input_id=self.ids[node], output_id=steps[node, scale])
        return steps[node, scale]

    def numbers(self, array: ArrayLike, *, name: str | None = None) -> int:
        """Constant float32 numbers."""
        values = np.ascontiguousarray(array, np.float32)
        data = values.tobytes()
        key = name or f"constant.{hashlib.sha256(repr(values.shape).encode() + data).hexdigest()}"
        return self._constant(key, data, values.shape, _FLOAT)

    def weight(self, name: str) -> int:
        """A small weight."""
        return self.numbers(active_store().vector(name), name=name)

    def matrix(self, name: str, stored: StoredMatrix) -> int:
        """A matrix, in its stored form."""
        dtypes = {
            ("fp32", "fp32"): _FLOAT,
            ("int8", "fp32"): xnn.XNNDatatype.xnn_datatype_qcint8,
            ("int4", "fp32"): xnn.XNNDatatype.xnn_datatype_qcint4,
            ("int4", "bf16"): xnn.XNNDatatype.xnn_datatype_qbint4,
        }
        dtype = dtypes[stored.dtype, stored.scale_dtype]
        quant = None
        if stored.dtype != "fp32" and name not in self.shared.constants:
            buffer = self._buffer(f"{name}.scales", stored.scales)
            outputs, inputs = stored.shape
            if stored.scale_dtype == "bf16":
                quant = xnn.PerChannelGroupQuant(
                    scale=[],
                    channel_dim=0,
                    group_size=stored.group,
                    scale_buffer_idx=buffer,
                    num_scales=outputs * (inputs // stored.group),
                )
            else:
                quant = xnn.PerChannelQuant(
                    scale=[], channel_dim=0, scale_buffer_idx=buffer, num_scales=outputs
                )
        return self._constant(name, stored.data, stored.shape, dtype, quant)

    def emit(self, kind: type[Any], **fields: Any) -> None:
        """Add a node."""
        bounds = fields.pop("output_min_max", None)
        node = kind(**fields, flags=0)
        self.graph.xnodes.append(xnn.XNode(node, self.handle, bounds))

    def one(self, kind: type[Any], x: int, *, dims: Sequence[int], out: int | None = None) -> int:
        """A node of one input; `out` takes its result."""
        out = self.value(dims) if out is None else out
        self.emit(kind, input_id=x, output_id=out)
        return out

    def two(
        self, kind: type[Any], a: int, b: int, *, dims: Sequence[int], out: int | None = None
    ) -> int:
        """A node of two inputs; `out` takes its result."""
        out = self.value(dims) if out is None else out
        self.emit(kind, input1_id=a, input2_id=b, output_id=out)
        return out

    def product(self, x: int, matrix: int, bias: int | None, out: int) -> None:
        """x @ matrix.T + bias."""
        bias = XNN_INVALID_VALUE_ID if bias is None else bias
        self.emit(xnn.XNNFullyConnected, input1_id=x, filter_id=matrix, bias_id=bias, output_id=out)

    def reshape(self, x: int, shape: _Dims, *, dims: Sequence[int], out: int | None = None) -> int:
        """x in another shape, 0 for a size that stays."""
        out = self.value(dims) if out is None else out
        self.emit(
            xnn.XNNStaticReshape, num_dims=len(shape), new_shape=shape, input_id=x, output_id=out
        )
        return out

    def slice(self, x: int, offsets: _Dims, sizes: _Dims, *, dims: Sequence[int]) -> int:
        """A part of x, 0 for a size that stays."""
        out = self.value(dims)
        self.emit(
            xnn.XNNStaticSlice,
            num_dims=len(sizes),
            offsets=offsets,
            sizes=sizes,
            input_id=x,
            output_id=out,
        )
        return out

    def mean(self, x: int, width: int, *, out: int, add: float | None = None) -> None:
        """Mean of x over its last axis, and a number added.

        As a product: XNNPACK's own mean is for four axes only.
        """
        share = self.numbers(np.full((1, width), 1 / width))
        self.product(x, share, None if add is None else self.numbers([add]), out)

    def _constant(
        self,
        key: str,
        data: bytes | FileBackedData,
        dims: Sequence[int],
        dtype: xnn.XNNDatatype,
        quant: Any = None,
    ) -> int:
        constants = self.shared.constants
        if key not in constants:
            constants[key] = self._add(dims, dtype, buffer=self._buffer(key, data), quant=quant)
        return constants[key]

    def _buffer(self, key: str, data: bytes | FileBackedData) -> int:
        """Bytes in the store of the `.pte`."""
        self.graph.constant_data.append(
            xnn.ConstantDataOffset(offset=UINT64_MAX, size=len(data), named_key=key)
        )
        self.visitor._named_data_store.add_named_data(key, data, CONSTANT_TENSOR_ALIGNMENT)
        return len(self.graph.constant_data) - 1

    def _add(
        self, dims: Sequence[int], dtype: xnn.XNNDatatype, *, buffer: int, quant: Any = None
    ) -> int:
        value: Any = xnn.XNNTensorValue(
            datatype=dtype,
            num_dims=len(dims),
            dims=list(dims),
            constant_buffer_idx=buffer,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=len(self.graph.xvalues),
        )
        if quant is not None:
            value = xnn.XNNQuantizedTensorValue(tensor_value=value, quant_params=quant)
        self.graph.xvalues.append(xnn.XValue(value))
        return len(self.graph.xvalues) - 1


def _linear(sheet: _Sheet) -> None:
    _, name, bias, _ = sheet.node.args
    stored = active_store().matrix(str(name))
    if scales := _static_scales(sheet.node):
        given, wanted = scales
        out = sheet.quantized(sheet.dims(), wanted)
        sheet.shared.steps[sheet.node, wanted] = out
        x = sheet.steps(_rounded_from(sheet.node.args[0]), given)
        sheet.product(x, sheet.matrix(str(name), stored), None, out)
        return
    x = sheet.input(0)
    if stored.dtype != "fp32":
        quantized = sheet.shared.quantized
        if x not in quantized:
            quantized[x] = sheet.quantized(sheet.dims(0))
            sheet.emit(xnn.XNNConvert, input_id=x, output_id=quantized[x])
        x = quantized[x]
    added = sheet.weight(str(bias)) if bias else None
    sheet.product(x, sheet.matrix(str(name), stored), added, sheet.output())


def _round_activation(sheet: _Sheet) -> None:
    """Through 8 bits and back, unless all that takes it computes in 8 bits."""
    if all(_static_scales(user) for user in sheet.node.users):
        return
    steps = sheet.steps(_rounded_from(sheet.node), _scale(sheet.node))
    sheet.emit(xnn.XNNConvert, input_id=steps, output_id=sheet.output())


def _static_scales(node: torch.fx.Node) -> tuple[float, float] | None:
    """Scales of input and output of a linear layer that is computed in integers; None of others.

    Both have to be rounded by the checkpoint's own scales. Products of codes are then exact, where
    the usual kernel would round the input once more. XNNPACK refuses factors of 256 and more.
    """
    users = list(node.users)
    if not (_is(node, "linear") and _is(node.args[0], "round_activation") and len(users) == 1):
        return None
    stored = active_store().matrix(str(node.args[1]))
    if not (_is(users[0], "round_activation") and stored.dtype != "fp32") or node.args[2]:
        return None
    given, wanted = _scale(node.args[0]), _scale(users[0])
    fits = stored.scale_dtype == "fp32" and given * stored.scale_values.max() < 255 * wanted
    return (given, wanted) if fits else None


def _is(node: object, name: str) -> TypeGuard[torch.fx.Node]:
    """Whether a node is one of our operators, in the same delegate."""
    found = getattr(node.target, "__name__", "") if isinstance(node, torch.fx.Node) else ""
    return bool(found == f"{NAMESPACE}.{name}.default")


def _scale(node: torch.fx.Node) -> float:
    """The scale of a `round_activation`."""
    return float(active_store().vector(str(node.args[1])).item())


def _rounded_from(node: object) -> torch.fx.Node:
    """What a `round_activation` rounds."""
    assert isinstance(node, torch.fx.Node)
    x = node.args[0]
    assert isinstance(x, torch.fx.Node)
    return x


def _rms_norm(sheet: _Sheet) -> None:
    _, name, eps = sheet.node.args
    x, dims = sheet.input(0), sheet.dims()
    assert isinstance(eps, float)
    mean = sheet.value([*dims[:-1], 1])
    sheet.mean(sheet.one(xnn.XNNSquare, x, dims=dims), dims[-1], out=mean, add=eps)
    factor = sheet.one(xnn.XNNReciprocalSquareRoot, mean, dims=[*dims[:-1], 1])
    if not name:
        sheet.two(xnn.XNNMultiply, x, factor, dims=dims, out=sheet.output())
        return
    normed = sheet.two(xnn.XNNMultiply, x, factor, dims=dims)
    sheet.two(xnn.XNNMultiply, normed, sheet.weight(str(name)), dims=dims, out=sheet.output())


def _mean(sheet: _Sheet) -> None:
    sheet.mean(sheet.input(0), sheet.dims(0)[-1], out=sheet.output())


def _multiply_weight(sheet: _Sheet) -> None:
    x, weight = sheet.input(0), sheet.weight(str(sheet.node.args[1]))
    sheet.two(xnn.XNNMultiply, x, weight, dims=sheet.dims(), out=sheet.output())


def _rotate(sheet: _Sheet) -> None:
    x, dims = sheet.input(0), sheet.dims()
    half = dims[3] // 2
    part, angle = [*dims[:3], half], [*dims[:2], 1, half]

    def by_head(index: int) -> int:
        """Cosines or sines `[B, T, 1, D / 2]`."""
        given, angles = sheet.input(index), sheet.shared.angles
        if given not in angles:
            angles[given] = sheet.reshape(given, [1, 0, 1, half], dims=angle)
        return angles[given]

    cos, sin = by_head(1), by_head(2)
    first, second = (
        sheet.slice(x, [0, 0, 0, begin], [0, 0, 0, half], dims=part) for begin in (0, half)
    )

    def times(a: int, b: int) -> int:
        return sheet.two(xnn.XNNMultiply, a, b, dims=part)

    low = sheet.two(xnn.XNNSubtract, times(first, cos), times(second, sin), dims=part)
    high = sheet.two(xnn.XNNAdd, times(second, cos), times(first, sin), dims=part)
    nothing = dict.fromkeys(("input3_id", "input4_id", "input5_id"), XNN_INVALID_VALUE_ID)
    sheet.emit(
        xnn.XNNConcatenate2,
        axis=3,
        input1_id=low,
        input2_id=high,
        output_id=sheet.output(),
        **nothing,
    )


def _activate(sheet: _Sheet) -> None:
    x, dims, name = sheet.input(0), sheet.dims(), sheet.node.args[1]
    plain = {
        "gelu": xnn.XNNGelu,
        "sigmoid": xnn.XNNSigmoid,
        "tanh": xnn.XNNTanh,
        "square": xnn.XNNSquare,
        "sqrt": xnn.XNNSquareRoot,
    }
    if name == "relu":
        sheet.emit(
            xnn.XNNClamp,
            input_id=x,
            output_id=sheet.output(),
            output_min_max=xnn.OutputMinMax(output_min=0, output_max="+inf"),
        )
    elif name == "silu":
        gate = sheet.one(xnn.XNNSigmoid, x, dims=dims)
        sheet.two(xnn.XNNMultiply, gate, x, dims=dims, out=sheet.output())
    elif name == "gelu_tanh":
        # XNNPACK's own is the one of the error function. This is x sigmoid(k x (1 + c x^2)), the
        # same as x (1 + tanh(k x (1 + c x^2) / 2)) / 2.
        k, c = 2 * math.sqrt(2 / math.pi), 0.044715
        inner = sheet.one(xnn.XNNSquare, x, dims=dims)
        inner = sheet.two(xnn.XNNMultiply, inner, sheet.numbers([k * c]), dims=dims)
        inner = sheet.two(xnn.XNNAdd, inner, sheet.numbers([k]), dims=dims)
        inner = sheet.two(xnn.XNNMultiply, inner, x, dims=dims)
        gate = sheet.one(xnn.XNNSigmoid, inner, dims=dims)
        sheet.two(xnn.XNNMultiply, gate, x, dims=dims, out=sheet.output())
    else:
        sheet.one(plain[str(name)], x, dims=dims, out=sheet.output())


def _with_number(kind: type[Any]) -> Callable[[_Sheet], None]:
    def define(sheet: _Sheet) -> None:
        x, number = sheet.input(0), sheet.node.args[1]
        assert isinstance(number, float)
        sheet.two(kind, x, sheet.numbers([number]), dims=sheet.dims(), out=sheet.output())

    return define


def _pick(sheet: _Sheet) -> None:
    x, layer, (batch, tokens, _, width) = sheet.input(0), sheet.node.args[1], sheet.dims(0)
    assert isinstance(layer, int)
    picked = sheet.slice(x, [0, 0, layer, 0], [0, 0, 1, width], dims=[batch, tokens, 1, width])
    sheet.reshape(picked, [1, 0, width], dims=sheet.dims(), out=sheet.output())


def _split(sheet: _Sheet) -> None:
    _, heads, size = sheet.node.args
    assert isinstance(heads, int)
    assert isinstance(size, int)
    sheet.reshape(sheet.input(0), [1, 0, heads, size], dims=sheet.dims(), out=sheet.output())


def _merge(sheet: _Sheet) -> None:
    width = sheet.dims()[2]
    sheet.reshape(sheet.input(0), [1, 0, width], dims=sheet.dims(), out=sheet.output())


_DEFINITIONS: dict[str, Callable[[_Sheet], None]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "mean": _mean,
    "multiply_weight": _multiply_weight,
    "round_activation": _round_activation,
    "rotate": _rotate,
    "activate": _activate,
    "scale": _with_number(xnn.XNNMultiply),
    "shift": _with_number(xnn.XNNAdd),
    "pick": _pick,
    "split": _split,
    "merge": _merge,
}
assert [*_DEFINITIONS] == OPERATORS


def _register(name: str, definition: Callable[[_Sheet], None]) -> None:
    """Tell XNNPACK's serializer about an operator; it is of ours alone, so nothing is replaced."""

    def define_node(
        self: NodeVisitor,
        node: torch.fx.Node,
        xnn_graph: xnn.XNNGraph,
        vals_to_ids: dict[torch.fx.Node, int],
        debug_handle: int,
    ) -> None:
        definition(_Sheet(self, node, xnn_graph, vals_to_ids, debug_handle))

    body = {"target": f"{NAMESPACE}.{name}.default", "define_node": define_node}
    register_node_visitor(type(f"Visit_{name}", (NodeVisitor,), body))


for _name, _definition in _DEFINITIONS.items():
    _register(_name, _definition)


class _Own(generic.GenericNodePartitionerConfig):
    """Takes every node of one of our operators."""

    def check_constraints(self, node: torch.fx.Node, ep: object) -> bool:
        return getattr(node.target, "__name__", "").startswith(f"{NAMESPACE}.")

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return [ConfigPrecisionType.FP32]

    def get_node_and_deps(self, node: torch.fx.Node, ep: object) -> list[torch.fx.Node]:
        return [node]


class Partitioner(XnnpackPartitioner):
    """Gives XNNPACK our operators, and sums and products of tensors."""

    def __init__(self) -> None:
        own = [type(f"Own_{n}", (_Own,), {"target_name": f"{n}.default"}) for n in OPERATORS]
        configs = [*own, generic.AddConfig, generic.MulConfig, generic.SubConfig]
        super().__init__(configs=configs)
        # XNNPACK's own passes look for patterns that ours replaced; this setting leaves out all but
        # one of them.
        self.delegation_spec = DelegationSpec(
            "XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")]
        )

    def ops_to_not_decompose(self, ep: object) -> tuple[list[Any], None]:
        return [], None
