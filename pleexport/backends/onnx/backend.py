"""ONNX graphs, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pleexport.backends.base import Conventions, Original, WeightStorage, check_threads
from pleexport.checksums import Checksums, check_files, checked_beside
from pleexport.contract import Artifact, GraphContract
from pleexport.errors import TargetError, UnsupportedError
from pleexport.program import Program
from pleexport.tied_layout import TIED, TiedLayout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pleexport.backends.onnx.session import OnnxSession
    from pleexport.checkpoint.matching import MatchedModel
    from pleexport.model import Model
    from pleexport.weights import WeightRequest

_PACKAGES = ("torch", "onnx-ir", "onnxscript")


class OnnxBackend:
    """See `backends.base.Backend`. What builds is imported when it is used."""

    name = "onnx"
    conventions = Conventions(contract_id="pleexport.decoder/1", slot_axis=2)
    hidden_values_build = False

    def require(self) -> None:
        """What builds is of the extra `export`, and what runs comes with this package."""

    def check(self, model: Model, request: WeightRequest) -> None:
        """On a CPU every model and dtype goes; zero points go with blocks."""
        if model.processor == "gpu":
            _check_for_gpu(model)
        if request.per_channel and not request.symmetric:
            raise TargetError(
                "`--no-symmetric` asks for zero points, and this target has one scale for each "
                "output and no zero points",
                hint="leave `--no-symmetric` out, or add `--block-size 128`",
            )

    def storage(self, request: WeightRequest) -> WeightStorage:
        """How weights are stored."""
        from pleexport.backends.onnx.storage import OnnxStorage

        return OnnxStorage(request)

    def bounds(self, contract: GraphContract, *, context: int) -> dict[str, int]:
        """Any size goes."""
        return {}

    def planned_files(
        self, model: Model, storage: WeightStorage, *, tied: TiedLayout | None
    ) -> dict[str, int]:
        """Bytes of the data files; the graph's structure is small."""
        from pleexport.backends.onnx.files import data_file
        from pleexport.backends.onnx.storage import data_places

        own = (w for w in model.weights if tied is None or w.name != tied.weight)
        weights = [storage.file_bytes(weight) for weight in own]  # codes and scales as one
        sizes: dict[str, int] = {}
        for (number, _), size in zip(data_places(weights), weights, strict=True):
            sizes[data_file(number)] = sizes.get(data_file(number), 0) + size
        return sizes | ({TIED: tied.nbytes} if tied else {})

    def working_bytes(self, model: Model, storage: WeightStorage) -> int:
        """None: weights are written where they stay."""
        return 0

    def lower(
        self,
        program: Program,
        matched: MatchedModel,
        storage: WeightStorage,
        folder: Path,
        *,
        tied: TiedLayout | None,
        importance: Mapping[str, NDArray[np.float32]],
        progress: Callable[[int], object],
    ) -> Artifact:
        """Write graph, data files and, where a matrix is tied, `tied.safetensors`."""
        from pleexport.backends.onnx.files import GRAPH
        from pleexport.backends.onnx.lower import translate
        from pleexport.backends.onnx.storage import OnnxStorage
        from pleexport.backends.onnx.weights import attach_weights, save

        assert isinstance(storage, OnnxStorage)
        graph = attach_weights(
            translate(program),
            matched,
            storage,
            importance,
            tied=tied,
            rounds_inputs=program.contract.processor == "cpu",
        )
        digest = save(graph, folder / GRAPH, progress=progress)
        return Artifact(
            backend=self.name,
            contract=program.contract,
            files=[GRAPH, *graph.data_files],
            weights_digest=digest,
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        )

    def open_session(
        self,
        folder: Path,
        artifact: Artifact,
        *,
        context: int,
        threads: int,
        spin: bool = True,
        packed_weights: Path | None,
        checksums: Checksums | None,
    ) -> OnnxSession:
        """Open a graph, with its weights copied into memory or mapped."""
        from pleexport.backends.onnx.files import GRAPH, open_graph, session_options
        from pleexport.backends.onnx.packing import checked_packed, packed_graph
        from pleexport.backends.onnx.session import OnnxSession, check_graph

        check_threads(threads)
        path = folder / GRAPH
        if checksums:  # of a damaged graph ONNX Runtime would say things of its own
            check_files([path], checksums)
        if packed_weights is None:
            weights = [folder / name for name in artifact.files if name != GRAPH]
            checked = checked_beside(weights, checksums)
        else:
            path = packed_graph(folder, artifact, packed_weights, checksums=checksums)
            checked = checked_packed(path, check=checksums is not None)
        with checked:
            session = open_graph(path, session_options(threads, spin=spin))
        check_graph(session, artifact.contract, where=str(path))
        return OnnxSession(session, artifact.contract, context=context, where=path)

    def hidden_values(
        self,
        folder: Path,
        artifact: Artifact,
        vectors: Mapping[str, NDArray[np.float32]],
        count: int,
        *,
        original: Original,
    ) -> list[NDArray[np.float32]]:
        """By layer, what it hands on."""
        from pleexport.backends.onnx.hidden import hidden_values

        return hidden_values(folder, artifact.contract, vectors, count)


def _check_for_gpu(model: Model) -> None:
    """Refuse what `GroupQueryAttention` does not compute on WebGPU, and loops."""
    other = "choose a target whose `processor` is `cpu`, such as `web`"
    if any(c.dtype != "fp32" for c in model.caches) or any(t.whole_text for t in model.tables):
        raise TargetError(
            "a graph for a GPU keeps keys and values in fp32, and another cache dtype is asked for",
            hint="leave `--cache-dtype` out, or choose another target",
        )
    if any(c.value_dim not in (None, c.head_dim) for c in model.caches):
        raise UnsupportedError(
            f"`{model.family}` has values that are wider than keys, and a GPU's attention takes "
            "both in one width",
            hint=other,
        )
    if model.strict_attention:
        raise UnsupportedError(
            f"`{model.family}` has layers in which a token does not see itself, and a GPU's "
            "attention always does",
            hint=other,
        )


BACKEND = OnnxBackend()
