"""Operators of our own, and the ONNX operators that they stand for.

The exporter puts a node of its own for each custom operator of `pleexport.layers`; `expand` writes
it out at the end, when shapes and dtypes are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir
from onnx.defs import OpSchema
from onnx_ir.passes import common as passes
from onnxscript.values import Op, Opset

from pleexport.contract import OPSET

DOMAIN = "pleexport"
_DTYPES = ["tensor(float)", "tensor(float16)", "tensor(int8)", "tensor(int64)"]


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
            type_constraints=[("T", _DTYPES, "")],
            attributes=[
                OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind))
                for name, kind in self.attributes.items()
            ],
        )
        return Op(Opset(DOMAIN, 1), self.name, schema)


def expand(model: ir.Model, operators: Sequence[Operator]) -> None:
    """Replace every node of `operators` by what it stands for."""
    by_name = {operator.name: operator for operator in operators}
    functions: dict[str, ir.Function] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        body = by_name[node.op_type].body(node)
        if body not in functions:
            head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> Expanded{len(functions)} '
            function = ir.serde.deserialize_function(onnx.parser.parse_function(head + body))
            functions[body] = model.functions[function.identifier()] = function
        node.op_type = functions[body].name
        node.attributes.clear()
    passes.InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


def sizes(value: ir.Value | None) -> list[int]:
    """A value's shape, -1 for dynamic dimensions."""
    assert value is not None
    assert value.shape is not None
    return [dim if isinstance(dim, int) else -1 for dim in value.shape]
