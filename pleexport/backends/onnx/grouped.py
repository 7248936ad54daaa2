"""Attention as a GPU computes it: one `GroupQueryAttention` in place of cache, mask and softmax.

The node writes new keys and values into its cache itself. It takes the positions of its queries to
be the last ones of the text, and sees no ring: a window is a number of slots before a query.

A layer that shares a cache gets the last of its keys and values once more, and writes them where
they are. Without any the graph would be shorter, but onnxruntime-web 1.30 leaves windows of such
nodes out on WebGPU, and gives NaN for them on WebAssembly.
Source: onnxruntime docs/ContribOperators.md, `com.microsoft.GroupQueryAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from pleexport.backends.onnx.expansion import MICROSOFT, Operator, sizes
from pleexport.contract import POSITION_IDS, CacheInput


def _no_body(node: ir.Node) -> str:
    raise AssertionError(f"`{node.name}` is left, which attention writes")


# Nodes of these are there for `GroupAttention` only.
WRITE_CACHE = Operator("WriteCache", ("out",), {}, _no_body)
ATTEND_CACHE = Operator(
    "AttendCache", ("out",), {"block": "INT", "softcap": "FLOAT", "window": "INT"}, _no_body
)


@dataclass(frozen=True)
class _Written:
    """A cache as the layer that owns it leaves it.

    Attributes:
        new: the new keys and the new values, each `[1, T, heads * width]`.
        caches: keys and values with these in them.
        shared_outputs: names for those that sharing layers give; the next one first.
    """

    new: list[ir.Value]
    caches: list[ir.Value]
    shared_outputs: list[list[str]]


class GroupAttention(InPlacePass):
    """Put one node in the place of writing a cache and attending to it.

    Args:
        caches: those of the contract, keys and values in turn.
    """

    def __init__(self, caches: Sequence[CacheInput]) -> None:
        super().__init__()
        self._by_input = {cache.input: cache for cache in caches}

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type != ATTEND_CACHE.name:
                continue
            if node.attributes["softcap"].as_float():
                raise PreconditionError("attention has a soft cap, which is wrong on WebGPU")
            if sizes(node.inputs[1]) != sizes(node.inputs[2]):
                raise PreconditionError("keys and values differ in shape")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        ends = _ends(graph)
        written: dict[ir.Value, _Written] = {}
        for node in list(graph):
            if node.op_type != ATTEND_CACHE.name:
                continue
            query, keys, values, query_ids, _ = node.inputs
            assert query is not None
            assert keys is not None
            assert values is not None
            own = written.get(keys)
            if own is None:
                new, past = self._taken(graph, node, [keys, values])
                names = [self._by_input[str(cache.name)].shared_outputs for cache in past]
                shared = [list(pair) for pair in zip(*names, strict=True)]
            else:
                new = [_at_queries(graph, node, x, query_ids) for x in own.new]
                past = own.caches
            grouped = _grouped(node, [_flat(graph, node, query), *new, *past, *ends])
            graph.insert_before(node, grouped)
            out, *present = grouped.outputs
            _take_place(node.outputs[0], out)
            if own is None:
                for before, after in zip((keys, values), present, strict=True):
                    _take_place(before, after)
                    write = before.producer()
                    assert write is not None
                    graph.remove(write, safe=True)
                written[present[0]] = _Written(new, present, shared)
            else:
                for name, value in zip(own.shared_outputs.pop(0), present, strict=True):
                    value.name = name
                    graph.outputs.append(value)
            graph.remove(node, safe=True)
        model.graph.opset_imports[MICROSOFT] = 1
        return PassResult(model, modified=bool(written))

    def ensures(self, model: ir.Model) -> None:
        outputs = {value.name for value in model.graph.outputs}
        missing = sorted(
            {n for cache in self._by_input.values() for n in cache.outputs if n not in outputs}
        )
        if missing:
            raise PostconditionError(f"the graph lacks the output `{missing[0]}`")

    def _taken(
        self, graph: ir.Graph, node: ir.Node, caches: list[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """What is written into keys and values, flat, and the inputs that it is written to."""
        new, past = [], []
        for value in caches:
            write = value.producer()
            assert write is not None
            assert write.op_type == WRITE_CACHE.name
            before, rows, _ = write.inputs
            assert before is not None
            assert rows is not None
            new.append(_flat(graph, node, rows))
            past.append(before)
        return new, past


def _grouped(node: ir.Node, inputs: list[ir.Value]) -> ir.Node:
    """The node that writes and attends; queries are scaled already."""
    attributes = {
        "num_heads": sizes(node.inputs[0])[2],
        "kv_num_heads": sizes(node.inputs[1])[1],
        "scale": 1.0,
        "local_window_size": node.attributes["window"].as_int() or -1,
        "do_rotary": 0,
    }
    made = ir.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, num_outputs=3)
    for value, like in zip(made.outputs, (node.outputs[0], *node.inputs[1:3]), strict=True):
        assert like is not None
        value.type, value.shape = like.type, like.shape
    return made


def _ends(graph: ir.Graph) -> list[ir.Value]:
    """Of the text with this call's tokens: its last position `[1]`, and its length; int32."""
    positions = next(value for value in graph.inputs if value.name == POSITION_IDS)
    tape = ir.tape.Tape()
    index, one = (
        tape.op("Constant", [], {"value": ir.tensor(np.array(n, dtype=np.int64))}) for n in (-1, 1)
    )
    last = tape.op("Gather", [positions, index], {"axis": 1})
    # In 64 bits, that no GPU computes with: the length has to be in the processor's memory.
    length = tape.op("Add", [last, one])
    ends = [tape.op("Cast", [x], {"to": ir.DataType.INT32}) for x in (last, length)]
    graph.insert_before(graph[0], tape.nodes)
    return ends


def _flat(graph: ir.Graph, node: ir.Node, x: ir.Value) -> ir.Value:
    """`[1, T, heads, width]` as `[1, T, heads * width]`."""
    heads, width = sizes(x)[2:]
    shape = ir.tensor(np.array([1, -1, heads * width], dtype=np.int64))
    constant = ir.node("Constant", [], {"value": shape})
    reshape = ir.node("Reshape", [x, constant.outputs[0]])
    graph.insert_before(node, [constant, reshape])
    return reshape.outputs[0]


def _at_queries(
    graph: ir.Graph, node: ir.Node, new: ir.Value, query_ids: ir.Value | None
) -> ir.Value:
    """Of new keys or values, those at the positions of the queries."""
    assert query_ids is not None
    chosen = query_ids.producer()
    if chosen is None:
        return new  # all positions
    assert chosen.op_type == "Gather"
    gather = ir.node("Gather", [new, chosen.inputs[1]], {"axis": 1})
    graph.insert_before(node, gather)
    return gather.outputs[0]


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Let a value stand for another, under its name."""
    new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
