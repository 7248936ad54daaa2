"""Operators of our own, and the ONNX operators that they stand for.

The exporter puts a node of its own for each custom operator of `pleexport.operators`; `Expand`
writes it out at the end, when shapes and dtypes are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir
from onnx.defs import OpSchema
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError
from onnx_ir.passes import common as passes
from onnxscript.values import Op, Opset

OPSET = 24
DOMAIN = "pleexport"
MICROSOFT = "com.microsoft"
_TENSORS = ["tensor(float)", "tensor(float16)", "tensor(int8)", "tensor(int64)"]


@dataclass(frozen=True)
class Operator:
    """An operator that no runtime knows.

    Attributes:
        outputs: names of its outputs, all float32.
        attributes: by name, "INT" or "FLOAT".
        body: for a node, inputs `=>` outputs and the operators in between, in ONNX's textual form.
    """

    name: str
    outputs: tuple[str, ...]
    attributes: dict[str, str]
    body: Callable[[ir.Node], str]

    @property
    def op(self) -> Op:
        """What the exporter calls for a node."""
        formal = OpSchema.FormalParameter
        schema = OpSchema(
            self.name,
            DOMAIN,
            1,
            inputs=[
                formal(
                    "inputs",
                    "T",
                    param_option=OpSchema.FormalParameterOption.Variadic,
                    is_homogeneous=False,
                )
            ],
            outputs=[formal(name, "tensor(float)") for name in self.outputs],
            type_constraints=[("T", _TENSORS, "")],
            attributes=[
                OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind))
                for name, kind in self.attributes.items()
            ],
        )
        return Op(Opset(DOMAIN, 1), self.name, schema)


class Expand(InPlacePass):
    """Replace every node of some operators of our own by what it stands for."""

    def __init__(self, operators: Sequence[Operator]) -> None:
        super().__init__()
        self._by_name = {operator.name: operator for operator in operators}

    def requires(self, model: ir.Model) -> None:
        used = {node.op_type for node in model.graph if node.domain == DOMAIN}
        if unknown := sorted(used - self._by_name.keys()):
            raise PreconditionError(f"the graph has `{unknown[0]}`, which is not known")

    def call(self, model: ir.Model) -> PassResult:
        functions: dict[str, ir.Function] = {}
        for node in model.graph:
            if node.domain != DOMAIN:
                continue
            body = self._by_name[node.op_type].body(node)
            if body not in functions:
                name = f"Expanded{len(functions)}"
                head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {name} '
                parsed = onnx.parser.parse_function(head + body)
                function = ir.serde.deserialize_function(parsed)
                functions[body] = model.functions[function.identifier()] = function
            node.op_type = functions[body].name
            node.attributes.clear()
        passes.InlinePass()(model)
        model.opset_imports.pop(DOMAIN, None)
        return PassResult(model, modified=bool(functions))

    def ensures(self, model: ir.Model) -> None:
        left = sorted(n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN)
        if left:
            raise PostconditionError(f"`{left[0]}` is left in the graph")


def sizes(value: ir.Value | None) -> list[int]:
    """A value's shape, -1 for dynamic dimensions."""
    assert value is not None
    assert value.shape is not None
    return [dim if isinstance(dim, int) else -1 for dim in value.shape]
