"""Our operators as ONNX, against their definitions written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from pleexport import operators
from pleexport.backends.onnx import attention
from pleexport.backends.onnx.attention import ATTEND_CONTEXT, ATTEND_WINDOW
from pleexport.backends.onnx.expansion import DOMAIN, OPSET, Expand, Operator
from pleexport.backends.onnx.lower import _linear_in_steps
from pleexport.backends.onnx.recurrence import WKV7
from pleexport.backends.onnx.rotation import ROTATE

BLOCK, HEAD_DIM, VALUE_DIM = 8, 4, 6
_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


def session(
    operator: Operator, inputs: list[ir.Value], attributes: dict[str, Any]
) -> ort.InferenceSession:
    """A graph of nothing but one of our operators."""
    node = ir.node(
        operator.name, inputs, attributes, domain=DOMAIN, num_outputs=len(operator.outputs)
    )
    for out, name in zip(node.outputs, operator.outputs, strict=True):
        out.name, out.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24, DOMAIN: 1})
    model = ir.Model(graph, ir_version=11)
    Expand([operator])(model)
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def attention_session(
    dtype: str, heads: int, cache_heads: int, *, softcap: float = 0.0, window: int = 0
) -> ort.InferenceSession:
    inputs = [ir.val("query", ir.DataType.FLOAT, ir.Shape([1, "T", heads, HEAD_DIM]))]
    for name, width in (("keys", HEAD_DIM), ("values", VALUE_DIM)):
        inputs.append(ir.val(name, _DTYPES[dtype], ir.Shape([1, cache_heads, "C", width])))
    if dtype == "int8":
        scale = ir.Shape([1, cache_heads, "C", 1])
        inputs += [ir.val(n, ir.DataType.FLOAT, scale) for n in ("key_scales", "value_scales")]
    inputs.append(ir.val("query_ids", ir.DataType.INT64, ir.Shape([1, "T"])))
    inputs.append(ir.val("held", ir.DataType.INT64, ir.Shape(["C"])))
    attributes = {"block": BLOCK, "softcap": softcap, "window": window}
    return session(ATTEND_CONTEXT, inputs, attributes)


def window_session(heads: int, cache_heads: int) -> ort.InferenceSession:
    shapes = {
        "query": [1, "T", heads, HEAD_DIM],
        "keys": [1, cache_heads, "C", HEAD_DIM],
        "values": [1, cache_heads, "C", VALUE_DIM],
        "bias": [1, "T", "C"],
    }
    inputs = [ir.val(n, ir.DataType.FLOAT, ir.Shape(shape)) for n, shape in shapes.items()]
    return session(ATTEND_WINDOW, inputs, {})


@pytest.mark.parametrize("step", [0.5, 0.03, 1e-4])
def test_steps_are_those_of_the_definition(step: float) -> None:
    """Bit for bit: halves, what lies outside, and behind it a node that moves axes about."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.step = torch.nn.Parameter(torch.eye(64)), torch.tensor(step)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps = (self.step, self.step * 3)
            return operators.linear_in_steps(x, self.weight, None, *steps).reshape(-1, 8, 8)

    halves = (torch.arange(-160, 160) + 0.5) * np.float32(step)
    noise = torch.randn(62, 64, generator=torch.Generator().manual_seed(0)) * 150 * step
    x = torch.cat((halves.reshape(5, 64), noise, torch.full((1, 64), 1e30)))
    table = {torch.ops.pleexport.linear_in_steps.default: _linear_in_steps}
    exported = torch.onnx.export(
        Layer().eval(),
        (x,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        custom_translation_table=table,
    )
    assert exported is not None
    session = ort.InferenceSession(
        exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = Layer()(x).detach().numpy()
    np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(expected.reshape(x.shape), x.numpy())


def reference(
    query: NDArray[np.float32],
    keys: NDArray[np.float64],
    values: NDArray[np.float64],
    first: int,
    *,
    softcap: float = 0.0,
    window: int = 0,
) -> NDArray[np.float64]:
    """softmax(q k) v; the query of token t sees slots up to first + t, or a window of them."""
    _, tokens, heads, _ = query.shape
    repeats = heads // keys.shape[1]
    out = np.empty((tokens, heads, VALUE_DIM))
    for t in range(tokens):
        for head in range(heads):
            end = first + t + 1
            seen = slice(max(0, end - window) if window else 0, end)
            scores = keys[0, head // repeats, seen] @ query[0, t, head].astype(np.float64)
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            out[t, head] = (weights / weights.sum()) @ values[0, head // repeats, seen]
    return out.reshape(1, tokens, heads * VALUE_DIM)


@pytest.mark.parametrize(
    ("dtype", "most_at_once"),
    [("fp32", 0), ("fp32", 1 << 18), ("fp16", 0), ("int8", 0)],
    ids=["fp32", "fp32 at once", "fp16", "int8"],
)
@pytest.mark.parametrize(("heads", "cache_heads"), [(1, 1), (6, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (0, 11), (7, 1), (8, 1), (13, 10)])
@pytest.mark.parametrize("options", [{}, {"softcap": 0.5}, {"window": 3}, {"window": 9}])
def test_blocks_give_what_the_whole_cache_gives(
    dtype: str,
    most_at_once: int,
    heads: int,
    cache_heads: int,
    first: int,
    tokens: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(heads * 100 + first)
    capacity = 4 * BLOCK  # more than is written: empty blocks, and a half-full one
    query = generator.normal(size=(1, tokens, heads, HEAD_DIM)).astype(np.float32)
    feeds = {"query": query}
    wide = []
    for name, width in (("key", HEAD_DIM), ("value", VALUE_DIM)):
        vectors = generator.normal(size=(1, cache_heads, capacity, width))
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
    monkeypatch.setattr(attention, "_MOST_AT_ONCE", most_at_once)
    graph = attention_session(dtype, heads, cache_heads, **options)
    (got,) = graph.run(None, feeds)
    expected = reference(query, *wide, first, **options)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    # One slot less to see must show, or the mask is not tested.
    if written > 1:
        feeds["query_ids"] = feeds["query_ids"] - 1
        (blind,) = graph.run(None, feeds)
        assert np.abs(blind[:, -1] - expected[:, -1]).max() > 1e-3


@pytest.mark.parametrize(("heads", "cache_heads"), [(1, 1), (6, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (0, 11), (13, 1), (13, 10)])
@pytest.mark.parametrize("window", [1, 3, 40])
def test_a_window_gives_what_its_positions_give(
    heads: int, cache_heads: int, first: int, tokens: int, window: int
) -> None:
    generator = np.random.default_rng(heads * 100 + first)
    written, capacity = first + tokens, 32
    query = generator.normal(size=(1, tokens, heads, HEAD_DIM)).astype(np.float32)
    keys, values = (
        generator.normal(size=(1, cache_heads, capacity, width)).astype(np.float32)
        for width in (HEAD_DIM, VALUE_DIM)
    )
    slots = np.arange(capacity)
    query_ids = torch.arange(first, written)[None]
    held = torch.from_numpy(np.where(slots < written, slots, slots - capacity))
    bias = operators.attention_bias(query_ids, held, window=window)
    feeds = {"query": query, "keys": keys, "values": values, "bias": bias.numpy()}
    graph = window_session(heads, cache_heads)
    (got,) = graph.run(None, feeds)
    wide = (keys.astype(np.float64), values.astype(np.float64))
    expected = reference(query, *wide, first, window=window)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    defined = operators.attend_window(*(torch.from_numpy(x) for x in (query, keys, values)), bias)
    np.testing.assert_allclose(defined, expected, atol=2e-6)
    # A window that is one position longer must show.
    if written > window:
        feeds["bias"] = operators.attention_bias(query_ids, held, window=window + 1).numpy()
        assert np.abs(graph.run(None, feeds)[0][:, -1] - expected[:, -1]).max() > 1e-3


@pytest.mark.parametrize("form", ["window", "context at once", "context in blocks"])
def test_no_share_is_below_a_normal_number(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-95) is none. A value of 1e30 shows what its slot's share is in place of it."""
    monkeypatch.setattr(attention, "_MOST_AT_ONCE", 0 if form.endswith("blocks") else 1 << 18)
    feeds = {
        "query": np.ones((1, 1, 1, HEAD_DIM), dtype=np.float32),
        "keys": np.zeros((1, 1, BLOCK, HEAD_DIM), dtype=np.float32),
        "values": np.zeros((1, 1, BLOCK, VALUE_DIM), dtype=np.float32),
    }
    feeds["keys"][0, 0, 3, 0], feeds["values"][0, 0, 3] = -95, 1e30
    if form == "window":
        graph = window_session(1, 1)
        feeds["bias"] = np.zeros((1, 1, BLOCK), dtype=np.float32)
    else:
        graph = attention_session("fp32", 1, 1)
        feeds |= {"query_ids": np.array([[BLOCK - 1]]), "held": np.arange(BLOCK)}
    share = 1e-30 / (1 if form != "context in blocks" else BLOCK - 1)
    np.testing.assert_allclose(graph.run(None, feeds)[0], share * 1e30, rtol=1e-5)
    feeds["keys"][0, 0, 3, 0] = np.nan
    assert np.isnan(graph.run(None, feeds)[0]).all()


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8)])
def test_rotation_turns_pairs_by_their_angles(tokens: int, heads: int, size: int) -> None:
    generator = np.random.default_rng(size)
    x = generator.normal(size=(1, tokens, heads, size)).astype(np.float32)
    angles = generator.uniform(-9, 9, (1, tokens, size // 2))
    # A pair is a complex number, and a rotation a product with another.
    pairs = x[..., : size // 2] + 1j * x[..., size // 2 :].astype(np.complex128)
    turned = pairs * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate((turned.real, turned.imag), axis=-1)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    inputs = [ir.val("x", ir.DataType.FLOAT, ir.Shape([1, "T", heads, size]))]
    inputs += [ir.val(n, ir.DataType.FLOAT, ir.Shape([1, "T", size // 2])) for n in ("cos", "sin")]
    graph = session(ROTATE, inputs, {})
    (got,) = graph.run(None, {"x": x, "cos": cos, "sin": sin})
    np.testing.assert_allclose(got, expected, atol=2e-6)
    defined = operators.rotate(*(torch.from_numpy(array) for array in (x, cos, sin)))
    np.testing.assert_allclose(defined, expected, atol=2e-6)
    backwards = graph.run(None, {"x": x, "cos": cos, "sin": -sin})[0]
    assert np.abs(backwards - expected).max() > 1e-2


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 16)])
@pytest.mark.parametrize(
    "repeats", [False, True], ids=["all different", "one token again and again"]
)
def test_the_recurrence_gives_what_single_steps_give(
    tokens: int, heads: int, size: int, repeats: bool
) -> None:
    generator = np.random.default_rng(tokens)
    shape = (1, tokens, heads, size)
    r, k, v, a = (generator.normal(size=shape).astype(np.float32) for _ in range(4))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b = -a * generator.uniform(0, 1, shape).astype(np.float32)
    # From no decay to the fastest that there is, over a whole chunk.
    log_w = (-0.606531 * generator.uniform(0, 1, shape)).astype(np.float32)
    log_w[:, :, 0] = -0.606531
    if repeats:  # keys alike, removed as a whole, next to no decay: the hardest case
        b = -a
        for x in (r, k, v, a, b):
            x[:] = x[:, :1]
        log_w[:] = -1e-3
    state = generator.normal(size=(1, heads, size, size)).astype(np.float32)
    names = ("r", "log_w", "k", "v", "a", "b")
    inputs = [ir.val(n, ir.DataType.FLOAT, ir.Shape([1, "T", heads, size])) for n in names]
    inputs.append(ir.val("state", ir.DataType.FLOAT, ir.Shape([1, heads, size, size])))
    feeds = dict(zip(names, (r, log_w, k, v, a, b), strict=True)) | {"state": state}
    graph = session(WKV7, inputs, {})
    got_y, got_state = graph.run(None, feeds)

    wide, expected = state[0].astype(np.float64), np.empty(shape)
    for t in range(tokens):
        for h in range(heads):
            moved = np.diag(np.exp(log_w[0, t, h].astype(np.float64)))
            moved += np.outer(a[0, t, h], b[0, t, h])
            wide[h] = wide[h] @ moved + np.outer(v[0, t, h], k[0, t, h])
            expected[0, t, h] = wide[h] @ r[0, t, h]
    scale = np.abs(expected).max()
    tolerance = (1e-4 if repeats else 1e-5) * scale
    np.testing.assert_allclose(got_y, expected, atol=tolerance)
    np.testing.assert_allclose(got_state[0], wide, atol=tolerance)
    feeds["b"] = -b
    assert np.abs(graph.run(None, feeds)[0] - expected).max() > 0.01 * scale
