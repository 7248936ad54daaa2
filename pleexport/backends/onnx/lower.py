"""Translate a traced program to ONNX and stream its weights into external data."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch
import xxhash
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript.values import Opset

import pleexport.families.layers  # noqa: F401  registers torch.ops.pleexport
from pleexport.backends.onnx.attention import ATTEND_IN_BLOCKS
from pleexport.backends.onnx.expansion import expand
from pleexport.backends.onnx.recurrence import WKV7
from pleexport.backends.onnx.storage import BITS, WeightFormat
from pleexport.checkpoint.matching import Binding
from pleexport.contract import NUM_LOGITS_TO_KEEP, OPSET
from pleexport.errors import CheckpointError
from pleexport.export.trace import LOGIT_POSITIONS, GraphInput, inputs, output_names
from pleexport.model import CacheDtype, Model, Weight
from pleexport.parallel import map_in_order
from pleexport.quantize import Blocks, groups, quantize_blocks
from pleexport.runtime.blob_layout import align

MICROSOFT = "com.microsoft"
_PAGE = 4096
_CACHE_LINE = 64
_BATCH_VALUES = 4 << 20
_onnx = Opset("", OPSET)
_attend, _wkv7 = ATTEND_IN_BLOCKS.op, WKV7.op


@dataclass
class StoredTensor:
    """A tensor of the data file, and how to produce its bytes.

    Attributes:
        produce: yields consecutive parts of the tensor.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    produce: Callable[[], Iterator[NDArray[Any]]]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


@dataclass
class OnnxGraph:
    """A graph without weight values, and the plan of its data file."""

    model: ir.Model
    tensors: list[StoredTensor] = field(default_factory=list)


def translate(
    program: torch.export.ExportedProgram, model: Model, cache_dtype: CacheDtype
) -> ir.Model:
    """The ONNX form of a traced program, its weights still without values."""
    arguments, results = inputs(model, cache_dtype), output_names(model, cache_dtype)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[argument.name for argument in arguments],
            output_names=results,
            custom_translation_table={
                torch.ops.pleexport.write_cache.default: _write_cache,
                torch.ops.pleexport.attend_in_blocks.default: _attend_in_blocks,
                torch.ops.pleexport.wkv7.default: _wkv7,
            },
        )
    assert exported is not None
    graph_model = exported.model
    graph = graph_model.graph
    _name_dimensions(graph, arguments)
    _count_logits(graph)
    del graph.outputs[len(results) - model.num_layers :]
    _fix_reshapes(graph)
    expand(graph_model, (ATTEND_IN_BLOCKS, WKV7))
    for cleanup in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
        # The exporter notes source lines of the machine it ran on.
        passes.ClearMetadataAndDocStringPass(),
    ):
        cleanup(graph_model)
    graph_model.producer_name = "pleexport"
    graph_model.producer_version = None
    return graph_model


def attach_weights(
    graph_model: ir.Model,
    binding: Binding,
    weights: WeightFormat,
    importance: Mapping[str, NDArray[np.float32]],
) -> OnnxGraph:
    """Replace the weights by references into a data file, in their stored form.

    Args:
        importance: see `quantize_blocks`, by weight; none for those that were not measured.
    """
    result = OnnxGraph(graph_model)
    graph = graph_model.graph
    for weight in binding.model.weights:
        value = graph.initializers.pop(weight.name, None)
        if value is None:
            raise AssertionError(f"weight `{weight.name}` is not in the graph")
        if weight.precision == "full":
            _store(result, value, _plain(binding, weight))
            continue
        for transpose in list(value.consumers()):
            (matmul,) = transpose.outputs[0].consumers()
            _replace_matmul(result, matmul, binding, weight, weights, importance.get(weight.name))
            graph.remove(transpose, safe=True)
    position = 0
    for tensor in result.tensors:
        alignment = _PAGE if tensor.nbytes >= _PAGE else _CACHE_LINE
        tensor.offset = align(position, alignment)
        position = tensor.offset + tensor.nbytes
    return result


def save(
    onnx_graph: OnnxGraph,
    path: Path,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> str:
    """Write `path` and its data file `path.data`.

    Args:
        progress: called with the number of bytes written since its last call.
    Returns:
        a digest of the stored weights.
    Raises:
        CheckpointError: a weight holds values that cannot be stored.
    """
    data_path = path.with_name(path.name + ".data")
    for tensor in onnx_graph.tensors:
        onnx_graph.model.graph.initializers[tensor.name].const_value = ir.ExternalTensor(
            data_path.name,
            tensor.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            base_dir=str(path.parent),
        )
    digest = xxhash.xxh3_128()
    with data_path.open("wb") as file:
        for tensor in onnx_graph.tensors:
            file.seek(tensor.offset)
            _write_tensor(file, tensor, digest, progress)
    ir.save(onnx_graph.model, path)
    return f"xxh3-128:{digest.hexdigest()}"


def _write_cache(cache: Any, new: Any, first_slot: Any) -> Any:
    return _onnx.TensorScatter(cache, new, first_slot, axis=-2, mode="circular")


def _attend_in_blocks(
    query: Any,
    cache: Sequence[Any],
    query_ids: Any,
    held: Any,
    block: int,
    softcap: float = 0.0,
    window: int = 0,
) -> Any:
    return _attend(query, *cache, query_ids, held, block=block, softcap=softcap, window=window)


def _name_dimensions(graph: ir.Graph, arguments: list[GraphInput]) -> None:
    """Give the symbolic dimensions their names in the contract."""
    names = {}
    for value, argument in zip(graph.inputs, arguments, strict=True):
        assert value.shape is not None
        for dim, name in zip(value.shape, argument.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim):
                names[dim.value] = str(name)
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value in names:
                value.shape[axis] = names[dim.value]


def _count_logits(graph: ir.Graph) -> None:
    """Replace the input of logit positions by `num_logits_to_keep`: the last n, or all for 0."""
    positions = next(value for value in graph.inputs if value.name == LOGIT_POSITIONS)
    tokens = graph.inputs[0]
    keep = ir.val(NUM_LOGITS_TO_KEEP, ir.DataType.INT64, ir.Shape([]))
    tape = ir.tape.Tape()
    zero, one = (
        tape.op("Constant", [], {"value": ir.tensor(np.array(n, dtype=np.int64))}) for n in (0, 1)
    )
    count = tape.op("Squeeze", [tape.op("Shape", [tokens], {"start": 1, "end": 2})])
    wanted = tape.op("Where", [tape.op("Equal", [keep, zero]), count, keep])
    first = tape.op("Sub", [count, wanted])
    last = tape.op("Range", [first, count, one])
    last.shape, last.type = positions.shape, positions.type
    positions.replace_all_uses_with(last)
    graph.inputs[graph.inputs.index(positions)] = keep
    graph.insert_before(graph[0], tape.nodes)


def _fix_reshapes(graph: ir.Graph) -> None:
    """Reshape to a constant wherever at most one dimension is dynamic, and once, not in steps."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.outputs[0].shape is None:
            continue
        shape = [dim if isinstance(dim, int) else -1 for dim in node.outputs[0].shape]
        if shape.count(-1) > 1:
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(shape, dtype=np.int64))})
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)
        before = node.inputs[0].producer()
        while before is not None and before.op_type == "Reshape":
            node.replace_input_with(0, before.inputs[0])
            before = node.inputs[0].producer()


def _store(result: OnnxGraph, value: ir.Value, tensor: StoredTensor) -> None:
    value.name, value.shape = tensor.name, ir.Shape(tensor.shape)
    value.type, value.const_value = ir.TensorType(tensor.dtype), None
    result.model.graph.initializers[tensor.name] = value
    result.tensors.append(tensor)


def _initializer(result: OnnxGraph, tensor: StoredTensor) -> ir.Value:
    value = ir.Value(name=tensor.name)
    _store(result, value, tensor)
    return value


def _replace_matmul(
    result: OnnxGraph,
    matmul: ir.Node,
    binding: Binding,
    weight: Weight,
    weights: WeightFormat,
    importance: NDArray[np.float32] | None,
) -> None:
    """Make a product with a transposed weight one with the weight's stored form."""
    x, out = matmul.inputs[0], matmul.outputs[0]
    graph, dtype = result.model.graph, weights.stored_dtype(weight)
    if dtype in BITS:
        attributes = {
            "K": weight.shape[1],
            "N": weight.shape[0],
            "bits": BITS[dtype],
            "block_size": weights.block_size_of(weight),
            "accuracy_level": 4,
        }
        stored = [
            _initializer(result, tensor)
            for tensor in _quantized(binding, weight, BITS[dtype], weights, importance)
        ]
        nodes = [ir.node("MatMulNBits", [x, *stored], attributes, domain=MICROSOFT)]
        graph.opset_imports[MICROSOFT] = 1
    else:
        plain = _initializer(result, _transposed(binding, weight, dtype))
        nodes = []
        if dtype == "fp16":
            nodes.append(ir.node("Cast", [plain], {"to": ir.DataType.FLOAT}))
            plain = nodes[0].outputs[0]
        nodes.append(ir.node("MatMul", [x, plain]))
    graph.insert_before(matmul, nodes)
    ir.convenience.replace_nodes_and_values(
        graph, matmul, [matmul], [], [out], [nodes[-1].outputs[0]]
    )


def _plain(binding: Binding, weight: Weight) -> StoredTensor:
    def produce() -> Iterator[NDArray[Any]]:
        yield binding.values(weight)

    return StoredTensor(weight.name, ir.DataType.FLOAT, weight.shape, produce)


def _transposed(binding: Binding, weight: Weight, dtype: str) -> StoredTensor:
    """A matrix `[K, N]`, which ONNX Runtime multiplies without a copy of its own."""
    outputs, inputs = weight.shape
    numpy_dtype = np.float16 if dtype == "fp16" else np.float32

    def produce() -> Iterator[NDArray[Any]]:
        step = max(1, _BATCH_VALUES // outputs)
        view = binding.matrix(weight)
        for begin in range(0, inputs, step):
            part = binding.raised(view[:, begin : begin + step])
            with np.errstate(over="ignore"):
                yield _finite(weight, part.T.astype(numpy_dtype, order="C"))

    data_type = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.FLOAT
    return StoredTensor(weight.name, data_type, (inputs, outputs), produce)


def _quantized(
    binding: Binding,
    weight: Weight,
    bits: int,
    weights: WeightFormat,
    importance: NDArray[np.float32] | None,
) -> list[StoredTensor]:
    """Codes, scales and zero points of a matrix.

    Scales and zero points, a tenth of the codes, are kept while the codes are written.
    """
    outputs, inputs = weight.shape
    block_size = weights.block_size_of(weight)
    blocks = groups(inputs, block_size)
    scales: list[NDArray[np.float32]] = []
    zero_points: list[NDArray[np.uint8]] = []

    matrix = binding.matrix(weight)

    def quantize(rows: slice) -> Blocks:
        values = _finite(weight, binding.raised(matrix[rows]))
        return quantize_blocks(
            values,
            bits=bits,
            block_size=block_size,
            symmetric=weights.symmetric,
            importance=importance,
        )

    def produce_codes() -> Iterator[NDArray[Any]]:
        step = max(1, _BATCH_VALUES // inputs)
        parts = (slice(begin, begin + step) for begin in range(0, outputs, step))
        for part in map_in_order(quantize, parts):
            scales.append(part.scales)
            if part.zero_points is not None:
                zero_points.append(part.zero_points)
            yield part.codes

    def produce_kept(kept: list[Any]) -> Iterator[NDArray[Any]]:
        yield from kept
        kept.clear()

    code_shape = (outputs, blocks, block_size * bits // 8)
    stored = [
        StoredTensor(f"{weight.name}.codes", ir.DataType.UINT8, code_shape, produce_codes),
        StoredTensor(
            f"{weight.name}.scales",
            ir.DataType.FLOAT,
            (outputs, blocks),
            lambda: produce_kept(scales),
        ),
    ]
    if not weights.symmetric:
        stored.append(
            StoredTensor(
                f"{weight.name}.zero_points",
                ir.DataType.UINT8,
                (outputs, groups(blocks * bits, 8)),
                lambda: produce_kept(zero_points),
            )
        )
    return stored


def _finite(weight: Weight, values: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"tensor `{weight.source_key}` holds values that are not finite in its stored dtype",
            hint="check the checkpoint, or choose another weight dtype",
        )
    return values


def _write_tensor(
    file: BinaryIO,
    tensor: StoredTensor,
    digest: xxhash.xxh3_128,
    progress: Callable[[int], object],
) -> None:
    written = 0
    for part in tensor.produce():
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        file.write(data)
        digest.update(data)
        written += len(data)
        progress(len(data))
    assert written == tensor.nbytes, tensor.name
