"""Changes of a translated graph, one pass each; `requires` and `ensures` are checked on every run.

Source of the classes: onnx_ir's `passes.InPlacePass`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from pleexport.backends.onnx.expansion import MICROSOFT
from pleexport.backends.onnx.files import NUM_LOGITS_TO_KEEP
from pleexport.program import Argument

# Elements of a constant that is cast here: shapes, bounds and single numbers.
_SMALL_CONSTANT = 64
# A float32 holds integers of so many bits, and no text is as long.
_POSITION_BITS = 24


class NameDimensions(InPlacePass):
    """Give symbolic dimensions the names that the contract has for them."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        super().__init__()
        self._arguments = arguments

    def requires(self, model: ir.Model) -> None:
        names = [value.name for value in model.graph.inputs]
        if names != [argument.name for argument in self._arguments]:
            raise PreconditionError(f"the graph's inputs are {names}, not the program's arguments")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        names = {}
        for value, argument in zip(graph.inputs, self._arguments, strict=True):
            assert value.shape is not None
            for dim, name in zip(value.shape, argument.shape, strict=True):
                if isinstance(dim, ir.SymbolicDim):
                    names[dim.value] = str(name)
        values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
        for value in values:
            for axis, dim in enumerate(value.shape or ()):
                if isinstance(dim, ir.SymbolicDim) and dim.value in names:
                    assert value.shape is not None
                    value.shape[axis] = names[dim.value]
        return PassResult(model, modified=bool(names))

    def ensures(self, model: ir.Model) -> None:
        for value, argument in zip(model.graph.inputs, self._arguments, strict=True):
            shape = [d if isinstance(d, int) else d.value for d in value.shape or ()]
            if shape != argument.shape:
                raise PostconditionError(f"`{value.name}` has shape {shape}, not {argument.shape}")


class CountLogits(InPlacePass):
    """Replace the input of logit positions by `num_logits_to_keep`: the last n, or all for 0."""

    def __init__(self, positions: str) -> None:
        super().__init__()
        self._positions = positions

    def requires(self, model: ir.Model) -> None:
        if all(value.name != self._positions for value in model.graph.inputs):
            raise PreconditionError(f"the graph has no input `{self._positions}`")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        positions = next(value for value in graph.inputs if value.name == self._positions)
        tokens = graph.inputs[0]
        keep = ir.val(NUM_LOGITS_TO_KEEP, ir.DataType.INT64, ir.Shape([]))
        tape = ir.tape.Tape()
        zero, one = (
            tape.op("Constant", [], {"value": ir.tensor(np.array(n, dtype=np.int64))})
            for n in (0, 1)
        )
        count = tape.op("Squeeze", [tape.op("Shape", [tokens], {"start": 1, "end": 2})])
        wanted = tape.op("Where", [tape.op("Equal", [keep, zero]), count, keep])
        first = tape.op("Sub", [count, wanted])
        last = tape.op("Range", [first, count, one])
        last.shape, last.type = positions.shape, positions.type
        positions.replace_all_uses_with(last)
        graph.inputs[graph.inputs.index(positions)] = keep
        graph.insert_before(graph[0], tape.nodes)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        names = [value.name for value in model.graph.inputs]
        if NUM_LOGITS_TO_KEEP not in names or self._positions in names:
            raise PostconditionError(f"the graph's inputs are {names}")


class KeepOutputs(InPlacePass):
    """Keep the first outputs, and drop the rest: the hidden values, which only parity asks for."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(names)

    def requires(self, model: ir.Model) -> None:
        names = [value.name for value in model.graph.outputs]
        if names[: len(self._names)] != self._names:
            raise PreconditionError(f"the graph's outputs begin with {names[: len(self._names)]}")

    def call(self, model: ir.Model) -> PassResult:
        dropped = len(model.graph.outputs) - len(self._names)
        del model.graph.outputs[len(self._names) :]
        return PassResult(model, modified=dropped > 0)


class FixReshapes(InPlacePass):
    """Reshape to a constant wherever at most one dimension is dynamic."""

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Reshape" or node.outputs[0].shape is None:
                continue
            shape = [dim if isinstance(dim, int) else -1 for dim in node.outputs[0].shape]
            if shape.count(-1) > 1:
                continue
            value = ir.tensor(np.array(shape, dtype=np.int64))
            constant = ir.node("Constant", [], {"value": value})
            model.graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
            node.attributes.pop("allowzero", None)
            modified = True
        return PassResult(model, modified=modified)


class MergeReshapes(InPlacePass):
    """Reshape once, not in steps: what a reshape takes from another one it takes from its input.

    A reshape whose shape copies a dimension (0) stays, as it would copy another one.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != "Reshape" or not _is_absolute(node.inputs[1]):
                continue
            before = node.inputs[0].producer() if node.inputs[0] else None
            while before is not None and before.op_type == "Reshape":
                node.replace_input_with(0, before.inputs[0])
                modified = True
                before = before.inputs[0].producer() if before.inputs[0] else None
        return PassResult(model, modified=modified)


class LeaveCasts(InPlacePass):
    """Take what has the wanted dtype as it is.

    A bound that is cast to the dtype of a vector on a GPU lies there, and the operator that takes
    it wants it in the processor's memory.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "CastLike" or not all(node.inputs):
                continue
            given, like = (ir.convenience.get_const_tensor(x) or x for x in node.inputs)
            if given.dtype == like.dtype is not None:
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                model.graph.remove(node, safe=True)
                modified = True
        return PassResult(model, modified=modified)


class AvoidCasts(InPlacePass):
    """Write other nodes in place of casts, for WebAssembly.

    There, ONNX Runtime's `Cast` is one function of 490 kB for all pairs of dtypes. A browser
    compiles it anew when it has been called some ten times, constants of a graph that is opened
    included. That takes it 4 to 10 s of a core and 106 MB, while a text begins.
    """

    def __init__(self, positions: str) -> None:
        super().__init__()
        self._positions = positions

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type not in ("Cast", "CastLike") or node.inputs[0] is None:
                continue
            value = self._without(model.graph, node, node.inputs[0], _wanted_dtype(node))
            if value is None:
                continue
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified=modified)

    def _without(
        self, graph: ir.Graph, node: ir.Node, x: ir.Value, wanted: ir.DataType | None
    ) -> ir.Value | None:
        """What is the cast's result without it; None where it has to stay."""
        constant = ir.convenience.get_const_tensor(x)
        if wanted is None or (constant is not None and constant.size > _SMALL_CONSTANT):
            return None
        source = _source(x)
        if wanted == (source.dtype if constant is None else constant.dtype):
            return x
        if constant is not None:
            return _initializer(graph, node, constant.numpy().astype(wanted.numpy()))
        if wanted == ir.DataType.FLOAT and source.name == self._positions:
            return _summed_bits(graph, node, x)
        return None


def _source(x: ir.Value) -> ir.Value:
    """What a value's elements are taken from."""
    producer = x.producer()
    while producer is not None and producer.op_type in ("Gather", "Reshape", "Unsqueeze"):
        assert producer.inputs[0] is not None
        x = producer.inputs[0]
        producer = x.producer()
    return x


def _wanted_dtype(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    like = node.inputs[1]
    constant = ir.convenience.get_const_tensor(like) if like is not None else None
    return constant.dtype if constant is not None else like.dtype if like is not None else None


def _initializer(graph: ir.Graph, node: ir.Node, array: NDArray[np.generic]) -> ir.Value:
    """A constant in place of a node's output."""
    tensor = ir.tensor(array, name=f"{node.outputs[0].name}.cast")
    value = ir.Value(name=tensor.name, const_value=tensor)
    value.dtype, value.shape = tensor.dtype, tensor.shape
    graph.register_initializer(value)
    return value


def _summed_bits(graph: ir.Graph, node: ir.Node, x: ir.Value) -> ir.Value:
    """Integers of 0 and more as float32: the sum of their bits' values, which is exact."""
    powers = 1 << np.arange(_POSITION_BITS)
    tape = ir.tape.Tape()
    bits, values, none, zero, last = (
        tape.op("Constant", [], {"value": ir.tensor(np.asarray(array))})
        for array in (
            powers,
            powers.astype(np.float32),
            np.int64(0),
            np.float32(0),
            np.array([-1]),
        )
    )
    own = tape.op("BitwiseAnd", [tape.op("Unsqueeze", [x, last]), bits])
    parts = tape.op("Where", [tape.op("Equal", [own, none]), zero, values])
    total = tape.op("ReduceSum", [parts, last], {"keepdims": 0})
    total.shape, total.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, tape.nodes)
    return total


class AnglesOnHost(InPlacePass):
    """Compute angles of positions where their cosines and sines are, which is not on a GPU.

    ONNX Runtime multiplies elements on WebGPU, and has no cosines of this opset there. So angles
    would go to the GPU and come back. `FusedMatMul` it has for CPUs only, and a product of a column
    with a row multiplies the same elements.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            takers = [user.op_type for user in node.outputs[0].consumers()]
            if node.op_type != "Mul" or not takers or set(takers) - {"Cos", "Sin"}:
                continue
            positions, frequencies = node.inputs
            tape = ir.tape.Tape()
            shape = tape.op("Constant", [], {"value": ir.tensor(np.array([1, -1]))})
            row = tape.op("Reshape", [frequencies, shape])
            angles = tape.op("FusedMatMul", [positions, row], domain=MICROSOFT)
            angles.shape, angles.type = node.outputs[0].shape, node.outputs[0].type
            graph.insert_before(node, tape.nodes)
            node.outputs[0].replace_all_uses_with(angles)
            graph.remove(node, safe=True)
            graph.opset_imports[MICROSOFT] = 1
            modified = True
        return PassResult(model, modified=modified)


def _is_absolute(shape: ir.Value | None) -> bool:
    """Whether a shape is a constant that copies no dimension."""
    constant = ir.convenience.get_const_tensor(shape) if shape is not None else None
    return constant is not None and 0 not in constant.numpy()
