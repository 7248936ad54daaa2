"""What the layers of a bundle's graph hand on, which the shipped graph does not output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pleexport.backends.onnx.files import GRAPH, open_graph
from pleexport.backends.onnx.session import OnnxSession
from pleexport.contract import LOGITS_OUTPUT, GraphContract, hidden_name, pieces


def hidden_values(
    folder: Path,
    contract: GraphContract,
    vectors: Mapping[str, NDArray[np.float32]],
    count: int,
) -> list[NDArray[np.float32]]:
    """By layer, what it hands on, `[T, ...]`; see `backends.base.Backend.hidden_values`."""
    names = [hidden_name(i) for i in range(contract.num_layers)]
    graph = _open(folder, names)
    session = OnnxSession(graph, contract, context=count, where=folder / GRAPH)
    found = [
        session.hidden(contract.cut(vectors, piece), piece.stop - piece.start, names)
        for piece in pieces(count, session.chunk)
    ]
    return [np.concatenate(layer) for layer in zip(*found, strict=True)]


def _open(folder: Path, names: list[str]) -> ort.InferenceSession:
    """A session on the graph with other outputs; logits are not computed."""
    model = ir.load(folder / GRAPH)
    values = {value.name: value for node in model.graph for value in node.outputs}
    kept = [value for value in model.graph.outputs if value.name != LOGITS_OUTPUT]
    model.graph.outputs[:] = [*(values[name] for name in names), *kept]
    RemoveUnusedNodesPass()(model)
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return open_graph(ir.to_proto(model).SerializeToString(), options)
