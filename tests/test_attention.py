"""Attention by blocks, as ONNX, against softmax attention written out in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from pleexport.graph.attention import SCHEMA, expand_attention

BLOCK, HEAD_DIM = 8, 4
_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


def session(dtype: str, heads: int, cache_heads: int) -> ort.InferenceSession:
    """A graph of nothing but the attention."""
    cache = ir.Shape([1, cache_heads, "C", HEAD_DIM])
    inputs = [ir.val("query", ir.DataType.FLOAT, ir.Shape([1, "T", heads, HEAD_DIM]))]
    inputs += [ir.val(name, _DTYPES[dtype], cache) for name in ("keys", "values")]
    if dtype == "int8":
        scale = ir.Shape([1, cache_heads, "C", 1])
        inputs += [ir.val(n, ir.DataType.FLOAT, scale) for n in ("key_scales", "value_scales")]
    inputs.append(ir.val("query_ids", ir.DataType.INT64, ir.Shape([1, "T"])))
    inputs.append(ir.val("held", ir.DataType.INT64, ir.Shape(["C"])))
    node = ir.node(SCHEMA.name, inputs, {"block": BLOCK}, domain=SCHEMA.domain)
    out = node.outputs[0]
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, [out], nodes=[node], opset_imports={"": 24, SCHEMA.domain: 1})
    model = ir.Model(graph, ir_version=11)
    expand_attention(model)
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def reference(
    query: NDArray[np.float32], keys: NDArray[np.float64], values: NDArray[np.float64], first: int
) -> NDArray[np.float64]:
    """softmax(q k) v; the query of token t sees slots 0 to first + t."""
    _, tokens, heads, size = query.shape
    repeats = heads // keys.shape[1]
    out = np.empty((tokens, heads, size))
    for t in range(tokens):
        for head in range(heads):
            seen = slice(0, first + t + 1)
            scores = keys[0, head // repeats, seen] @ query[0, t, head].astype(np.float64)
            weights = np.exp(scores - scores.max())
            out[t, head] = (weights / weights.sum()) @ values[0, head // repeats, seen]
    return out.reshape(1, tokens, heads * size)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("heads", "cache_heads"), [(1, 1), (6, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (0, 11), (7, 1), (8, 1), (13, 10)])
def test_blocks_give_what_the_whole_cache_gives(
    dtype: str, heads: int, cache_heads: int, first: int, tokens: int
) -> None:
    generator = np.random.default_rng(heads * 100 + first)
    capacity = 4 * BLOCK  # more than is written: empty blocks, and a half-full one
    query = generator.normal(size=(1, tokens, heads, HEAD_DIM)).astype(np.float32)
    shape = (1, cache_heads, capacity, HEAD_DIM)
    feeds = {"query": query}
    wide = []
    for name in ("key", "value"):
        vectors = generator.normal(size=shape)
        if dtype == "int8":
            scales = (np.abs(vectors).max(-1, keepdims=True) / 127).astype(np.float32)
            codes = np.rint(vectors / scales).astype(np.int8)
            feeds |= {f"{name}s": codes, f"{name}_scales": scales}
            wide.append(codes * scales.astype(np.float64))
        else:
            stored = vectors.astype(np.float16 if dtype == "fp16" else np.float32)
            feeds[f"{name}s"] = stored
            wide.append(stored.astype(np.float64))
    written, slots = first + tokens, np.arange(capacity)
    feeds["query_ids"] = np.arange(first, written)[None]
    feeds["held"] = np.where(slots < written, slots, slots - capacity)
    (got,) = session(dtype, heads, cache_heads).run(None, feeds)
    expected = reference(query, *wide, first)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    # One slot less to see must show, or the mask is not tested.
    if written > 1:
        feeds["query_ids"] = feeds["query_ids"] - 1
        (blind,) = session(dtype, heads, cache_heads).run(None, feeds)
        assert np.abs(blind[:, -1] - expected[:, -1]).max() > 1e-3
