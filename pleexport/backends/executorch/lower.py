"""Lower a traced program to a `.pte` file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize import _flatbuffer_program
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from numpy.typing import NDArray
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from pleexport.backends.executorch.program import METHOD
from pleexport.backends.executorch.rewrite import rewrite
from pleexport.backends.executorch.storage import ExecutorchStorage
from pleexport.backends.executorch.store import WeightSource, WeightStore, asked_by_visitors
from pleexport.backends.executorch.surroundings import undisturbed
from pleexport.backends.executorch.visitors import Partitioner
from pleexport.checkpoint.matching import MatchedModel
from pleexport.program import Program

_SERIALIZERS: tuple[Any, ...] = (xnnpack_graph_serialize, _flatbuffer_program)


def lower(
    program: Program,
    matched: MatchedModel,
    storage: ExecutorchStorage,
    path: Path,
    *,
    results: list[str],
    importance: Mapping[str, NDArray[np.float32]],
    progress: Callable[[int], object],
) -> str:
    """Write a `.pte` that computes the named results.

    Matrices wait in files beside it, so that none is in memory.

    Returns:
        a digest of the stored weights.
    Raises:
        CheckpointError: a weight holds values that cannot be stored.
    """
    with undisturbed():
        exported = rewrite(program, matched, results=results)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".weights-") as folder:
        store = WeightStore(
            matched, storage, Path(folder), importance=importance, progress=progress
        )
        write_program(exported, store, path)
    return store.digest


def write_program(exported: ExportedProgram, store: WeightSource, path: Path) -> None:
    """Write a program over `operators` and ATen as a `.pte`.

    Args:
        store: has the weights that its operators name.
    """
    with asked_by_visitors(store), temporary_in(path.parent), undisturbed(), torch.no_grad():
        edge = to_edge_transform_and_lower(
            {METHOD: exported},
            partitioner=[Partitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        drop_cache_outputs(edge.exported_program(METHOD))
        finished = edge.to_executorch(
            ExecutorchBackendConfig(
                # Inputs are the caller's: caches of its own size, written in place.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                extract_delegate_segments=True,
            )
        )
    with path.open("wb") as file:
        finished.write_to_file(file)


@contextmanager
def temporary_in(place: Path) -> Iterator[None]:
    """Let ExecuTorch's serializers make their temporary folders in a folder.

    A killed build leaves them behind, and the next one removes what lies in its own folders only.
    """
    ours = SimpleNamespace(TemporaryDirectory=partial(tempfile.TemporaryDirectory, dir=place))
    try:
        for serializer in _SERIALIZERS:
            serializer.tempfile = ours
        yield
    finally:
        for serializer in _SERIALIZERS:
            serializer.tempfile = tempfile


def drop_cache_outputs(exported: ExportedProgram) -> None:
    """Take out what functional programs need to write an input, since operators write in place.

    Before: each written cache is an output, and copied back. After: outputs are results alone.
    """
    graph, signature = exported.graph_module.graph, exported.graph_signature
    output = graph.output_node()
    kept = [
        i
        for i, spec in enumerate(signature.output_specs)
        if spec.kind != OutputKind.USER_INPUT_MUTATION
    ]
    (values,) = output.args
    assert isinstance(values, tuple | list)
    output.args = (tuple(values[i] for i in kept),)
    signature.output_specs[:] = [signature.output_specs[i] for i in kept]
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and "aten.copy" in str(node.target):
            graph.erase_node(node)
    exported.graph_module.recompile()
