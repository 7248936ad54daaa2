"""Changes of a translated graph: what each does, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx_ir.passes import PostconditionError, PreconditionError

from pleexport.backends.onnx.expansion import DOMAIN, Expand
from pleexport.backends.onnx.passes import (
    AvoidCasts,
    CountLogits,
    FixReshapes,
    KeepOutputs,
    MergeReshapes,
    NameDimensions,
)
from pleexport.program import Argument


def model(
    inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value] | None = None
) -> ir.Model:
    """A model of a few nodes; the last one's outputs are its own by default."""
    outputs = list(nodes[-1].outputs) if outputs is None else outputs
    for i, value in enumerate(v for node in nodes for v in node.outputs):
        value.name = value.name or f"v{i}"
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 24, DOMAIN: 1})
    return ir.Model(graph, ir_version=11)


def run(graph: ir.Model, **feeds: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    session = ort.InferenceSession(
        ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[NDArray[np.generic]] = session.run(None, feeds)
    return found


def tokens(*shape: int | str) -> ir.Value:
    return ir.val("tokens", ir.DataType.FLOAT, ir.Shape(shape))


def constant(values: list[int]) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array(values, dtype=np.int64))})


def test_dimensions_get_the_names_of_the_contract_everywhere() -> None:
    given = tokens(1, "s0", 4)
    node = ir.node("Neg", [given])
    node.outputs[0].shape = ir.Shape([1, "s0", 4])
    graph = model([given], [node])
    NameDimensions([Argument("tokens", [1, "sequence_length", 4], "fp32")])(graph)
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        assert value.shape == ir.Shape([1, "sequence_length", 4])


def test_arguments_of_another_program_are_refused() -> None:
    graph = model([tokens(1, "s0")], [ir.node("Neg", [tokens(1)])], [])
    with pytest.raises(PreconditionError, match="not the program's arguments"):
        NameDimensions([Argument("rows", [1], "fp32")])(graph)


def test_a_dimension_that_got_fixed_in_tracing_is_refused() -> None:
    given = tokens(1, 5)
    graph = model([given], [ir.node("Neg", [given])])
    with pytest.raises(PostconditionError, match=r"`tokens` has shape \[1, 5\]"):
        NameDimensions([Argument("tokens", [1, "sequence_length"], "fp32")])(graph)


@pytest.mark.parametrize(("keep", "kept"), [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3])])
def test_the_number_of_logits_selects_the_last_ones(keep: int, kept: list[int]) -> None:
    given = tokens(1, "t")
    positions = ir.val("logit_positions", ir.DataType.INT64, ir.Shape(["n"]))
    graph = model([given, positions], [ir.node("Gather", [given, positions], {"axis": 1})])
    CountLogits("logit_positions")(graph)
    feeds = {"tokens": np.arange(4, dtype=np.float32)[None], "num_logits_to_keep": np.int64(keep)}
    (found,) = run(graph, **{name: np.asarray(value) for name, value in feeds.items()})
    assert found.tolist() == [kept]


def test_a_graph_without_logit_positions_is_refused() -> None:
    given = tokens(1, "t")
    with pytest.raises(PreconditionError, match="no input `logit_positions`"):
        CountLogits("logit_positions")(model([given], [ir.node("Neg", [given])]))


def test_hidden_values_are_dropped_and_results_kept() -> None:
    given = tokens(1)
    nodes = [ir.node("Neg", [given]), ir.node("Abs", [given])]
    outputs = [nodes[0].outputs[0], nodes[1].outputs[0]]
    outputs[0].name, outputs[1].name = "logits", "layers.0.output"
    graph = model([given], nodes, outputs)
    KeepOutputs(["logits"])(graph)
    assert [value.name for value in graph.graph.outputs] == ["logits"]
    with pytest.raises(PreconditionError, match="begin with"):
        KeepOutputs(["present.0.key"])(graph)


def test_a_reshape_with_one_dynamic_dimension_takes_a_constant() -> None:
    given, shape = tokens(2, "t"), ir.val("shape", ir.DataType.INT64, ir.Shape([3]))
    node = ir.node("Reshape", [given, shape], {"allowzero": 1})
    node.outputs[0].shape = ir.Shape([1, 2, "t"])
    graph = model([given, shape], [node])
    FixReshapes()(graph)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (found,) = run(graph, tokens=values, shape=np.zeros(3, dtype=np.int64))
    assert found.tolist() == values[None].tolist()


def test_a_reshape_with_two_dynamic_dimensions_stays() -> None:
    given, shape = tokens("b", "t"), ir.val("shape", ir.DataType.INT64, ir.Shape([3]))
    node = ir.node("Reshape", [given, shape])
    node.outputs[0].shape = ir.Shape(["b", 1, "t"])
    FixReshapes()(model([given, shape], [node]))
    assert node.inputs[1] is shape


@pytest.mark.parametrize(("second", "merged"), [([3, -1], True), ([0, -1], False)])
def test_reshapes_in_a_row_become_one_unless_a_dimension_is_copied(
    second: list[int], merged: bool
) -> None:
    given, shapes = tokens(2, 3), [constant([6, 1]), constant(second)]
    first = ir.node("Reshape", [given, shapes[0].outputs[0]])
    last = ir.node("Reshape", [first.outputs[0], shapes[1].outputs[0]])
    graph = model([given], [*shapes, first, last])
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = run(graph, tokens=values)[0].tolist()
    MergeReshapes()(graph)
    assert (last.inputs[0] is given) == merged
    assert run(graph, tokens=values)[0].tolist() == before


def test_an_operator_that_nobody_knows_is_refused() -> None:
    given = tokens(1)
    graph = model([given], [ir.node("Fly", [given], domain=DOMAIN)])
    with pytest.raises(PreconditionError, match="`Fly`"):
        Expand([])(graph)


def cast(x: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [x], {"to": to})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), x.shape
    return node


def test_positions_become_numbers_without_a_cast() -> None:
    positions = ir.val("positions", ir.DataType.INT64, ir.Shape([1, "T"]))
    axis = constant([-1])
    column = ir.node("Unsqueeze", [positions, axis.outputs[0]])
    column.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    number = cast(column.outputs[0], ir.DataType.FLOAT)
    graph = model([positions], [axis, column, number, ir.node("Abs", number.outputs)])
    ids = np.array([[0, 1, 2, 131_071, 2**24 - 1]], dtype=np.int64)
    expected = run(graph, positions=ids)[0]
    assert AvoidCasts("positions")(graph).modified
    assert "Cast" not in {node.op_type for node in graph.graph}
    np.testing.assert_array_equal(run(graph, positions=ids)[0], expected)
    assert expected.ravel().tolist() == ids.ravel().tolist()


def test_casts_of_constants_are_made_at_once_and_needless_ones_left_out() -> None:
    given = constant([1, 2, 3])
    number = cast(given.outputs[0], ir.DataType.FLOAT)
    x = tokens(3)
    same = cast(x, ir.DataType.FLOAT)
    graph = model([x], [given, number, same, ir.node("Mul", [same.outputs[0], number.outputs[0]])])
    assert AvoidCasts("positions")(graph).modified
    assert "Cast" not in {node.op_type for node in graph.graph}
    two = np.full(3, 2, dtype=np.float32)
    np.testing.assert_array_equal(run(graph, tokens=two)[0], [2, 4, 6])


def test_a_cast_of_what_is_no_position_stays() -> None:
    # Its numbers may be below 0, of which there are no bits to add.
    numbers = ir.val("numbers", ir.DataType.INT64, ir.Shape([2]))
    graph = model([numbers], [cast(numbers, ir.DataType.FLOAT)])
    assert not AvoidCasts("positions")(graph).modified
    assert [node.op_type for node in graph.graph] == ["Cast"]
