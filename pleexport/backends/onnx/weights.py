"""Store weights beside an ONNX graph: attach them in their stored form, stream them into files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import xxhash
from numpy.typing import NDArray

from pleexport.backends.onnx.blocks import Blocks, blocks_of_codes, quantize_blocks
from pleexport.backends.onnx.channels import (
    IntegerProducts,
    channel_codes,
    channel_scales,
    stored_codes,
)
from pleexport.backends.onnx.expansion import MICROSOFT
from pleexport.backends.onnx.files import GRAPH_DATA, data_file
from pleexport.backends.onnx.passes import AvoidCasts
from pleexport.backends.onnx.storage import PANEL, OnnxStorage, data_places
from pleexport.checkpoint.matching import MatchedModel
from pleexport.contract import POSITION_IDS
from pleexport.dtypes import CODED, bits, numpy_dtype
from pleexport.errors import CheckpointError
from pleexport.model import Weight, misused_weight, unused_weight
from pleexport.parallel import map_in_order
from pleexport.sizes import align, groups
from pleexport.tied_layout import TIED, TiedLayout, tied_checksums

_BATCH_VALUES = 4 << 20


@dataclass
class StoredTensor:
    """A tensor of a data file, and how to produce its bytes.

    Attributes:
        produce: yields consecutive parts of the tensor.
        file: name of the file that it lies in.
        offset: byte of the file at which it begins.
        in_graph: False for what others read.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    produce: Callable[[], Iterator[NDArray[Any]]]
    file: str = GRAPH_DATA
    offset: int = 0
    in_graph: bool = True

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.ceil(math.prod(self.shape) * float(self.dtype.itemsize))


@dataclass
class OnnxGraph:
    """A graph without weight values, and the plan of its data files.

    Attributes:
        tensors: in the order in which they are written.
        tied: the matrix with a file of its own.
        rounds_inputs: products with codes take inputs in 8 bits, which is fast on a CPU.
    """

    model: ir.Model
    tied: TiedLayout | None = None
    rounds_inputs: bool = True
    tensors: list[StoredTensor] = field(default_factory=list)

    @property
    def data_files(self) -> list[str]:
        """Names of the files that the tensors lie in, that of the tied matrix last."""
        names = dict.fromkeys(tensor.file for tensor in self.tensors)
        return sorted(names, key=TIED.__eq__)


def attach_weights(
    graph_model: ir.Model,
    matched: MatchedModel,
    storage: OnnxStorage,
    importance: Mapping[str, NDArray[np.float32]],
    *,
    tied: TiedLayout | None = None,
    rounds_inputs: bool = True,
) -> OnnxGraph:
    """Replace the weights by references into data files, in their stored form.

    Before: the graph's initializers are the model's weights, and matrices are taken transposed.
    After: initializers are named tensors of the data files, each aligned for mapping.

    Args:
        importance: by weight, see `quantize_blocks`; none for those that were not measured.
        tied: the matrix that gets a file of its own.
        rounds_inputs: see `OnnxGraph`.
    Raises:
        FamilyError: declared weights and the traced function contradict each other.
    """
    result = OnnxGraph(graph_model, tied, rounds_inputs)
    graph = graph_model.graph
    products = IntegerProducts(graph)
    for weight in matched.model.weights:
        value = graph.initializers.pop(weight.name, None)
        if value is None:
            raise unused_weight(weight, matched.model.family)
        if weight.precision == "full":
            _store(result, value, _plain(matched, weight))
            continue
        for transpose, matmul in _products(value, weight):
            counts = importance.get(weight.name)
            if storage.is_per_channel(weight):
                tensors = _per_channel(matched, weight, storage, counts)
                scales, codes = (_initializer(result, tensor) for tensor in tensors)
                _replace(graph, matmul, products.replace(matmul, codes, scales))
            else:
                _replace_matmul(result, matmul, matched, weight, storage, counts)
            graph.remove(transpose, safe=True)
    if any(map(storage.is_per_channel, matched.model.weights)):
        AvoidCasts(POSITION_IDS)(graph_model)
    own = [tensor for tensor in result.tensors if tensor.file != TIED]
    places = data_places(tensor.nbytes for tensor in own)
    for tensor, (number, offset) in zip(own, places, strict=True):
        tensor.file, tensor.offset = data_file(number), offset
    return result


def save(
    onnx_graph: OnnxGraph,
    path: Path,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> str:
    """Write `path` and, beside it, its data files.

    Args:
        progress: called with the number of bytes written since its last call.
    Returns:
        a digest of the stored weights.
    Raises:
        CheckpointError: a weight holds values that cannot be stored.
    """
    initializers = onnx_graph.model.graph.initializers
    for tensor in onnx_graph.tensors:
        if not tensor.in_graph:
            continue
        initializers[tensor.name].const_value = ir.ExternalTensor(
            tensor.file,
            tensor.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            base_dir=str(path.parent),
        )
    hashed = xxhash.xxh3_128()
    with ExitStack() as stack:
        names = onnx_graph.data_files
        opened = {n: stack.enter_context((path.parent / n).open("wb")) for n in names}
        for tensor in onnx_graph.tensors:
            opened[tensor.file].seek(tensor.offset)
            _write_tensor(opened[tensor.file], tensor, hashed, progress)
        digest = f"xxh3-128:{hashed.hexdigest()}"
        if onnx_graph.tied:
            opened[TIED].seek(0)
            opened[TIED].write(onnx_graph.tied.head(digest))
    ir.save(onnx_graph.model, path)
    return digest


def _products(value: ir.Value, weight: Weight) -> list[tuple[ir.Node, ir.Node]]:
    """The products with a matrix: each a transpose of it, and the product that takes that.

    Raises:
        FamilyError: it is used for anything else.
    """
    products = []
    for transpose in value.consumers():
        takers = list(transpose.outputs[0].consumers())
        if transpose.op_type != "Transpose" or [n.op_type for n in takers] != ["MatMul"]:
            raise misused_weight(weight, taker=f"`{transpose.op_type}`")
        products.append((transpose, takers[0]))
    return products


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
    matched: MatchedModel,
    weight: Weight,
    storage: OnnxStorage,
    importance: NDArray[np.float32] | None,
) -> None:
    """Make a product with a transposed weight one with the weight's stored form."""
    x = matmul.inputs[0]
    graph, dtype = result.model.graph, storage.dtype_of(weight)
    if dtype in CODED:
        attributes = {
            "K": weight.shape[1],
            "N": weight.shape[0],
            "bits": bits(dtype),
            "block_size": storage.block_size_of(weight),
            "accuracy_level": 4 if result.rounds_inputs else 0,
        }
        tied = result.tied if result.tied and result.tied.weight == weight.name else None
        tensors = _quantized(matched, weight, storage, importance, tied)
        stored = [_initializer(result, tensor) for tensor in tensors if tensor.in_graph]
        result.tensors += [tensor for tensor in tensors if not tensor.in_graph]
        nodes = [ir.node("MatMulNBits", [x, *stored], attributes, domain=MICROSOFT)]
        graph.opset_imports[MICROSOFT] = 1
    else:
        plain = _initializer(result, _transposed(matched, weight, dtype))
        nodes = []
        if dtype == "fp16":
            nodes.append(ir.node("Cast", [plain], {"to": ir.DataType.FLOAT}))
            plain = nodes[0].outputs[0]
        nodes.append(ir.node("MatMul", [x, plain]))
    graph.insert_before(matmul, nodes)
    _replace(graph, matmul, nodes[-1].outputs[0])


def _replace(graph: ir.Graph, matmul: ir.Node, product: ir.Value) -> None:
    """Let another value stand for what a product gives."""
    ir.convenience.replace_nodes_and_values(
        graph, matmul, [matmul], [], [matmul.outputs[0]], [product]
    )


def _plain(matched: MatchedModel, weight: Weight) -> StoredTensor:
    def produce() -> Iterator[NDArray[Any]]:
        yield matched.values(weight)

    return StoredTensor(weight.name, ir.DataType.FLOAT, weight.shape, produce)


def _transposed(matched: MatchedModel, weight: Weight, dtype: str) -> StoredTensor:
    """A matrix `[K, N]`, which ONNX Runtime multiplies without a copy of its own."""
    outputs, inputs = weight.shape
    stored_dtype = numpy_dtype(dtype)

    def produce() -> Iterator[NDArray[Any]]:
        # Codes begin with a whole byte.
        step = align(max(1, _BATCH_VALUES // outputs), 4)
        for begin in range(0, inputs, step):
            part = matched.read(weight, columns=slice(begin, begin + step))
            with np.errstate(over="ignore"):
                yield _finite(weight, part.T.astype(stored_dtype, order="C"))

    data_type = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.FLOAT
    return StoredTensor(weight.name, data_type, (inputs, outputs), produce)


def _per_channel(
    matched: MatchedModel,
    weight: Weight,
    storage: OnnxStorage,
    importance: NDArray[np.float32] | None,
) -> list[StoredTensor]:
    """Scales `[N]` and codes `[panels, K, PANEL]` of a matrix with one scale for each output."""
    outputs, inputs = weight.shape
    own, code_bits = storage.keeps_codes(weight), bits(storage.dtype_of(weight))
    dtype = ir.DataType.UINT4 if code_bits == 4 else ir.DataType.UINT8
    # A panel is written as a whole.
    step = align(max(1, _BATCH_VALUES // inputs), PANEL)
    parts = [slice(begin, min(begin + step, outputs)) for begin in range(0, outputs, step)]
    found: list[NDArray[np.float32]] = []

    def produce_scales() -> Iterator[NDArray[Any]]:
        for rows in parts:
            if own:
                scales = matched.codes(weight, rows, slice(0, 4)).scales[:, 0, 0]
            else:
                scales = channel_scales(matched.read(weight, rows), importance=importance)
            found.append(_finite(weight, scales.astype(np.float32)))
            yield found[-1]

    def produce_codes() -> Iterator[NDArray[Any]]:
        for rows, scales in zip(parts, found, strict=True):
            if own:
                yield stored_codes(matched.codes(weight, rows), bits=code_bits)
            else:
                yield channel_codes(_finite(weight, matched.read(weight, rows)), scales)

    shape = (groups(outputs, PANEL), inputs, PANEL)
    return [
        StoredTensor(f"{weight.name}.scales", ir.DataType.FLOAT, (outputs,), produce_scales),
        StoredTensor(f"{weight.name}.codes", dtype, shape, produce_codes),
    ]


def _quantized(
    matched: MatchedModel,
    weight: Weight,
    storage: OnnxStorage,
    importance: NDArray[np.float32] | None,
    tied: TiedLayout | None,
) -> list[StoredTensor]:
    """Codes, scales and zero points of a matrix, and the checksums of rows of a tied one.

    All but the codes, a tenth of these, is kept while the codes are written.
    """
    outputs, inputs = weight.shape
    code_bits, block_size = bits(storage.dtype_of(weight)), storage.block_size_of(weight)
    blocks = groups(inputs, block_size)
    scales: list[NDArray[np.float32]] = []
    zero_points: list[NDArray[np.uint8]] = []
    checksums: list[NDArray[np.uint64]] = []

    def quantize(rows: slice) -> Blocks:
        if weight.codes is not None and storage.keeps_codes(weight):
            own = matched.codes(weight, rows)
            _finite(weight, own.scales)
            return blocks_of_codes(own, weight.codes, block_size=block_size)
        values = _finite(weight, matched.read(weight, rows))
        return quantize_blocks(
            values,
            bits=code_bits,
            block_size=block_size,
            symmetric=not storage.has_zero_points(weight),
            # In a lookup, all elements of a row count alike.
            importance=None if tied else importance,
            rounding=storage.rounding_of(weight),
        )

    def produce_codes() -> Iterator[NDArray[Any]]:
        step = max(1, _BATCH_VALUES // inputs)
        begins = range(0, outputs, step)
        found = map_in_order(quantize, (slice(begin, begin + step) for begin in begins))
        for begin, part in zip(begins, found, strict=True):
            if tied:
                ids = np.arange(begin, begin + len(part.codes))
                checksums.append(tied_checksums(part.codes, part.scales, ids))
            scales.append(part.scales)
            if part.zero_points is not None:
                zero_points.append(part.zero_points)
            yield part.codes

    def produce_kept(kept: list[Any]) -> Iterator[NDArray[Any]]:
        yield from kept
        kept.clear()

    code_shape = (outputs, blocks, block_size * code_bits // 8)
    stored = [
        StoredTensor(f"{weight.name}.codes", ir.DataType.UINT8, code_shape, produce_codes),
        StoredTensor(
            f"{weight.name}.scales",
            ir.DataType.FLOAT,
            (outputs, blocks),
            lambda: produce_kept(scales),
        ),
    ]
    if storage.has_zero_points(weight):
        stored.append(
            StoredTensor(
                f"{weight.name}.zero_points",
                ir.DataType.UINT8,
                (outputs, groups(blocks * code_bits, 8)),
                lambda: produce_kept(zero_points),
            )
        )
    return _in_their_file(stored, weight, tied, lambda: produce_kept(checksums)) if tied else stored


def _in_their_file(
    stored: list[StoredTensor],
    weight: Weight,
    tied: TiedLayout,
    produce_checksums: Callable[[], Iterator[NDArray[Any]]],
) -> list[StoredTensor]:
    """Codes and scales of a tied matrix in their places, and the checksums of its rows."""
    sums = StoredTensor(
        f"{weight.name}.checksums",
        ir.DataType.UINT64,
        (tied.rows,),
        produce_checksums,
        in_graph=False,
    )
    offsets = (tied.codes_offset, tied.scales_offset, tied.checksums_offset)
    return [
        replace(tensor, file=TIED, offset=offset)
        for tensor, offset in zip((*stored, sums), offsets, strict=True)
    ]


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
