"""A copy of a bundle whose graph does not round the inputs of matrices to 8 bits.

WebAssembly leaves them as they are, whatever a graph asks for. On other processors this is how to
see what it computes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
from resealed import fit_manifest


def unrounded(bundle: Path, out: Path) -> Path | None:
    """Write the copy; None where no matrix of the graph rounds its inputs.

    Args:
        bundle: a bundle of the backend `onnx`.
        out: the copy's folder.
    """
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    changed = 0
    for graph in (model.graph, *model.functions):
        changed += _leave_floats(graph)
    if not changed:
        return None
    shutil.copytree(bundle, out)
    (out / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    fit_manifest(out)
    return out


def _leave_floats(graph: onnx.GraphProto | onnx.FunctionProto) -> int:
    changed = 0
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and attribute.i:
                attribute.i = 0
                changed += 1
            if attribute.HasField("g"):
                changed += _leave_floats(attribute.g)
    return changed
