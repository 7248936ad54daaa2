"""Write a Gemma 4 checkpoint as transformers.js reads it: lookups, and a decoder.

    python benchmarks/write_transformersjs.py CHECKPOINT OUT --dtype q4 --rows BUNDLE

Caches grow, as Optimum exports them: a call takes those of all tokens before, and gives them with
the new ones. The decoder is our graph for a GPU, whose attention is one node, so that both sides
compute the same. It is compared with our runner before it is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import pleexport
from pleexport.runtime.blob import Blob

# By dtype: the suffix that transformers.js wants, and what we build with.
DTYPES = {"fp32": ("", "fp32"), "q8": ("_quantized", "fp32"), "q4": ("_q4", "int4")}
# The lookups are in int8 whatever the decoder is in: they are those of our bundle.
EMBEDDINGS = "embed_tokens_quantized.onnx"
_BATCH_ROWS = 4096
# Of the logits' range; int8 by tensor rounds more than our form does, and is not compared.
_TOLERANCE = 1e-4
_CHECKED_IDS = [2, 7, 900, 31, 4000, 31, 12, 77, 5, 60, 61, 62]


def write(checkpoint: Path, out: Path, dtype: str, rows: Path) -> None:
    """Write the folder; lookups that are there are kept.

    Args:
        rows: the bundle that has the lookups.
    Raises:
        SystemExit: the decoder computes other logits than ours.
    """
    suffix, weight_dtype = DTYPES[dtype]
    (out / "onnx").mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": True}
    (out / "config.json").write_text(json.dumps(config))
    with tempfile.TemporaryDirectory(dir=out) as folder:
        bundle = pleexport.build(
            checkpoint,
            Path(folder) / "bundle",
            target="web-gpu",
            weight_dtype=weight_dtype,
            verify=False,
        )
        if not (out / "onnx" / EMBEDDINGS).exists():
            _write_embeddings(pleexport.Bundle(rows), out / "onnx" / EMBEDDINGS)
        model = onnx.load(bundle.path / "model.onnx")
        let_caches_grow(model)
        path = out / "onnx" / f"decoder_model_merged{suffix}.onnx"
        if dtype == "q8":  # as the scripts of transformers.js do it
            plain = Path(folder) / "plain.onnx"
            _save(model, plain)
            whole = Path(folder) / "q8.onnx"
            quantize_dynamic(
                plain, whole, weight_type=QuantType.QUInt8, use_external_data_format=True
            )
            _save(onnx.load(whole), path)
        else:
            _save(model, path)
            _check(bundle, path)


def let_caches_grow(model: onnx.ModelProto) -> None:
    """Make caches that are written in place ones of the tokens before, which grow.

    A layer that shares keys and values writes those of the last positions into a whole cache. Here
    it takes the cache without these.
    """
    graph = model.graph
    own = {value.name for value in graph.input if value.name.startswith("past_key_values.")}
    given = {name.replace("past_key_values", "present") for name in own}
    nodes, cut = [], {}
    zero, axis = (_constant(graph, f"growing.{n}", [n]) for n in (0, 2))
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            for place in (3, 4):
                past = node.input[place]
                if past in own:
                    continue
                if past not in cut:
                    cut[past] = f"{past}.before"
                    count, end = f"{past}.count", f"{past}.end"
                    nodes += [
                        helper.make_node("Shape", [node.input[1]], [count], start=1, end=2),
                        helper.make_node("Neg", [count], [end]),
                        helper.make_node("Slice", [past, zero, end, axis], [cut[past]]),
                    ]
                node.input[place] = cut[past]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    outputs = [value for value in graph.output if value.name == "logits" or value.name in given]
    del graph.output[:]
    graph.output.extend(outputs)
    for values, length in ((graph.input, "past"), (graph.output, "total")):
        for value in values:
            if value.name in own | given:
                value.type.tensor_type.shape.dim[2].dim_param = length


def _constant(graph: onnx.GraphProto, name: str, value: Sequence[int]) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), name))
    return name


def _write_embeddings(bundle: pleexport.Bundle, path: Path) -> None:
    """Both lookups as one graph, each vector's values in int8 with one scale for each layer."""
    blob = bundle.open_blob()
    nodes, initializers, outputs = [], [], []
    for lookup in bundle.decoder.contract.lookup_inputs:
        shape = [n for n in lookup.shape[2:] if isinstance(n, int)]
        codes, scales = _rounded(blob, lookup.table, shape)
        initializers += [
            numpy_helper.from_array(codes, f"{lookup.name}.codes"),
            numpy_helper.from_array(scales, f"{lookup.name}.scales"),
        ]
        parts = [f"{lookup.name}.{part}" for part in ("rows", "numbers", "steps")]
        nodes += [
            helper.make_node("Gather", [f"{lookup.name}.codes", "input_ids"], [parts[0]]),
            helper.make_node("Cast", [parts[0]], [parts[1]], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{lookup.name}.scales", "input_ids"], [parts[2]]),
            helper.make_node("Mul", parts[1:], [lookup.name]),
        ]
        outputs.append(
            helper.make_tensor_value_info(lookup.name, TensorProto.FLOAT, ["b", "t", *shape])
        )
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])
    graph = helper.make_graph(nodes, "embed_tokens", [ids], outputs, initializers)
    opsets = [helper.make_opsetid("", 21)]
    _save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def _rounded(
    blob: Blob, table: str, shape: list[int]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A table's rows `[V, *shape]` as int8, and their scales `[V, ..., 1]`."""
    codes = np.empty((blob.num_rows, *shape), np.int8)
    scales = np.empty((blob.num_rows, *shape[:-1], 1), np.float32)
    for begin in range(0, blob.num_rows, _BATCH_ROWS):
        ids = np.arange(begin, min(begin + _BATCH_ROWS, blob.num_rows))
        values = blob.lookup(blob.row_ids(ids))[table].reshape(len(ids), *shape)
        step = np.maximum(np.abs(values).max(axis=-1, keepdims=True) / 127, 1e-30)
        codes[begin : begin + len(ids)] = np.rint(values / step)
        scales[begin : begin + len(ids)] = step
    return codes, scales


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, and its tensors where transformers.js looks for them."""
    data = f"{path.name}_data"
    (path.parent / data).unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=1024)


def _check(bundle: pleexport.Bundle, path: Path) -> None:
    """Compare the logits of a prompt and of single tokens with those of our runner.

    Raises:
        SystemExit: they are others.
    """
    expected = pleexport.Runner(bundle).logits(_CHECKED_IDS)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    blob = bundle.open_blob()
    contract = bundle.decoder.contract
    feeds: dict[str, Any] = {
        value.name: np.zeros([n if isinstance(n, int) else 0 for n in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in session.get_outputs()]
    begin, found = 0, []
    for count in (len(_CHECKED_IDS) - 3, 1, 1, 1):
        ids = np.array(_CHECKED_IDS[begin : begin + count])
        vectors = blob.lookup(blob.row_ids(ids))
        for lookup in contract.lookup_inputs:
            shape = [1, count, *lookup.shape[2:]]
            feeds[lookup.name] = vectors[lookup.table].astype(np.float32).reshape(shape)
        feeds["position_ids"] = np.arange(begin, begin + count)[None]
        feeds["num_logits_to_keep"] = np.array(1)
        results = dict(zip(names, session.run(names, feeds), strict=True))
        found.append(results.pop("logits")[0, -1])
        for name, value in results.items():
            feeds[name.replace("present", "past_key_values")] = value
        begin += count
    wanted = expected[len(expected) - len(found) :]
    error = np.abs(np.array(found) - wanted).max() / np.ptp(wanted)
    if error > _TOLERANCE:
        raise SystemExit(
            f"error: `{path}` computes other logits than ours: {error:.1e} of the range"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="bundle that has the lookups")
    arguments = parser.parse_args()
    write(arguments.checkpoint, arguments.out, arguments.dtype, arguments.rows)


if __name__ == "__main__":
    main()
