"""The ONNX form of `operators.rotate`: one node, where written out it is eight."""

from __future__ import annotations

import onnx_ir as ir

from pleexport.backends.onnx.expansion import Operator, sizes


def _body(node: ir.Node) -> str:
    """The operators in ONNX's textual form; N heads of size D."""
    heads, size = sizes(node.inputs[0])[2:]
    return f"""(x, cos, sin) => (out) {{
  flat_shape = Constant <value = int64[3] {{1, -1, {heads * size}}}> ()
  flat = Reshape (x, flat_shape)
  rotated = RotaryEmbedding <num_heads = {heads}> (flat, cos, sin)
  out_shape = Constant <value = int64[4] {{1, -1, {heads}, {size}}}> ()
  out = Reshape (rotated, out_shape)
}}"""


ROTATE = Operator("Rotate", ("out",), {}, _body)
