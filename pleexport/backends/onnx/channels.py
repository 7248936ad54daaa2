"""Products of integers, with one scale for each token and one for each output.

WebAssembly has no kernel for blocks: it unpacks the whole matrix of a `MatMulNBits` at every call.
It multiplies integers well. `DynamicQuantizeMatMul` would be one node, but it rounds all tokens of
a call by the loudest one.

Codes lie in panels, each the weights of a few outputs. What WebAssembly multiplies it copies first,
a few outputs at a time: of `[K, N]` it would take some bytes out of each of K distant rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pleexport.backends.onnx.storage import PANEL
from pleexport.codes import QuantizedRows, join_codes
from pleexport.quantize import SMALLEST, best_scales, round_to_codes
from pleexport.sizes import align

# Both sides are unsigned: where a processor lacks the right instruction, ONNX Runtime's products of
# unsigned with signed codes overflow.
_ZERO_POINT = 128
_LARGEST_CODE = 127


@dataclass(frozen=True)
class QuantizedInput:
    """A float32 `[1, T, K]` as integers: value = (code - 128) * scale.

    Attributes:
        codes: uint8 `[1, T, K]`.
        scale: float32, `[1, T, 1]` or a scalar.
    """

    codes: ir.Value
    scale: ir.Value


class IntegerProducts:
    """Writes products of integers into a graph. An input of several products is rounded once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._inputs: dict[ir.Value, QuantizedInput] = {}
        self._constants: dict[str, ir.Value] = {}

    def replace(self, matmul: ir.Node, codes: ir.Value, scales: ir.Value) -> ir.Value:
        """The product `[1, T, N]` of a `MatMul`'s input with codes, put before the `MatMul`.

        Args:
            codes: uint4 or uint8 `[panels, K, PANEL]`, half of their range standing for 0.
            scales: float32 `[N]`.
        """
        x = matmul.inputs[0]
        assert x is not None
        if x not in self._inputs:
            self._inputs[x] = self._own_codes(x) or self._rounded(x)
        given, zero, outputs = self._inputs[x], self._zero_point(8), _length(scales)
        nodes = []
        if codes.dtype == ir.DataType.UINT4:  # widened when the graph is opened
            nodes.append(ir.node("Cast", [codes], {"to": ir.DataType.UINT8}))
            codes, weights_zero = nodes[0].outputs[0], self._zero_point(4)
        else:
            weights_zero = zero
        product = ir.node("MatMulInteger", [given.codes, codes, zero, weights_zero])
        joined = self._joined(product.outputs[0], outputs)
        # A product with 1, since casts are dear there: `AvoidCasts` says why.
        unit = self._constant("one", np.float32(1))
        numbers = ir.node("DequantizeLinear", [joined[-1].outputs[0], unit])
        # Each scale by itself: ONNX Runtime would fuse a product of both as if it were one number.
        of_tokens = ir.node("Mul", [numbers.outputs[0], given.scale])
        of_outputs = ir.node("Mul", [of_tokens.outputs[0], scales])
        nodes += [product, *joined, numbers, of_tokens, of_outputs]
        self._graph.insert_before(matmul, nodes)
        return of_outputs.outputs[0]

    def _joined(self, panels: ir.Value, outputs: int) -> list[ir.Node]:
        """What makes `[1, T, N]` of `[panels, T, PANEL]`; of one token, nothing is moved."""
        width = align(outputs, PANEL)
        shape = self._constant(f"width_{width}", np.array([1, -1, width]))
        by_token = ir.node("Transpose", [panels], {"perm": [1, 0, 2]})
        whole = ir.node("Reshape", [by_token.outputs[0], shape])
        if width == outputs:
            return [by_token, whole]
        bounds = [self._constant(f"index_{n}", np.array([n])) for n in (0, outputs, 2)]
        return [by_token, whole, ir.node("Slice", [whole.outputs[0], *bounds])]

    def _own_codes(self, x: ir.Value) -> QuantizedInput | None:
        """The codes of an input that the original rounds itself; None where it does not."""
        node = x.producer()
        if node is None or node.op_type != "DequantizeLinear":
            return None
        codes, scale, _ = node.inputs
        assert codes is not None
        assert scale is not None
        return QuantizedInput(codes, scale)

    def _rounded(self, x: ir.Value) -> QuantizedInput:
        """Each token's vector by its own largest element."""
        tiny = self._constant("tiny", np.float32(SMALLEST))
        steps = self._constant("largest_code", np.float32(_LARGEST_CODE))
        last = self._constant("last_axis", np.array([-1]))
        size = ir.node("Abs", [x])
        largest = ir.node("ReduceMax", [size.outputs[0], last], {"keepdims": 1})
        above_zero = ir.node("Max", [largest.outputs[0], tiny])
        scale = ir.node("Div", [above_zero.outputs[0], steps])
        in_steps = ir.node("Div", [x, scale.outputs[0]])
        unit = self._constant("one", np.float32(1))
        codes = ir.node("QuantizeLinear", [in_steps.outputs[0], unit, self._zero_point(8)])
        nodes = [size, largest, above_zero, scale, in_steps, codes]
        # Right behind what makes it, since the first product to ask may not be the first to run.
        producer = x.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(producer, nodes)
        return QuantizedInput(codes.outputs[0], scale.outputs[0])

    def _zero_point(self, bits: int) -> ir.Value:
        return self._constant(f"zero_point_{bits}", np.uint8(1 << (bits - 1)))

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> ir.Value:
        if name not in self._constants:
            tensor = ir.tensor(np.asarray(value), name=f"integer_products.{name}")
            made = ir.Value(name=tensor.name, const_value=tensor)
            made.dtype, made.shape = tensor.dtype, tensor.shape
            self._graph.register_initializer(made)
            self._constants[name] = made
        return self._constants[name]


def _length(value: ir.Value) -> int:
    assert value.shape is not None
    length = value.shape[0]
    assert isinstance(length, int)
    return length


def channel_scales(
    weight_NK: NDArray[np.float32], *, importance: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The scale `[N]` of each output that leaves the least squared error among a few.

    Args:
        importance: `[K]`, how much a squared error in each input's weights counts.
    """
    grouped = weight_NK[:, None]
    widest = np.abs(grouped).max(axis=-1) / np.float32(_LARGEST_CODE)
    weighted = None if importance is None else importance[None]
    limit = float(_LARGEST_CODE)
    return best_scales(grouped, widest, -limit, limit, bits=8, importance=weighted)[:, 0]


def channel_codes(weight_NK: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes `[panels, K, PANEL]` of rows `[N, K]` of a matrix; the last panel is filled with 0."""
    limit = float(_LARGEST_CODE)
    codes = round_to_codes(weight_NK[:, None], scales[:, None], -limit, limit)[:, 0]
    return _panels(codes, zero_point=_ZERO_POINT)


def stored_codes(rows: QuantizedRows, *, bits: int) -> NDArray[np.uint8]:
    """A checkpoint's own codes as `[panels, K, PANEL]`; nothing is rounded.

    Args:
        rows: codes `[N, 1, K]`.
        bits: 4 or 8; two codes of 4 bits lie in a byte, the first in the low bits.
    """
    codes = _panels(rows.codes[:, 0], zero_point=1 << (bits - 1))
    return codes if bits == 8 else join_codes(codes.reshape(-1), bits=4)


def _panels(codes_NK: NDArray[Any], *, zero_point: int) -> NDArray[np.uint8]:
    outputs, inputs = codes_NK.shape
    codes = (codes_NK.astype(np.int16) + zero_point).astype(np.uint8)
    whole = np.pad(codes, ((0, -outputs % PANEL), (0, 0)), constant_values=zero_point)
    return np.ascontiguousarray(whole.reshape(-1, PANEL, inputs).transpose(0, 2, 1))
