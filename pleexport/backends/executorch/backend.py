"""ExecuTorch programs, run by XNNPACK on the CPU."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pleexport.backends.base import Conventions, Original, WeightStorage, check_threads
from pleexport.backends.executorch.bounds import bounds
from pleexport.backends.executorch.storage import ExecutorchStorage, refusal_of_codes
from pleexport.backends.executorch.surroundings import undisturbed
from pleexport.checksums import Checksums, check_files
from pleexport.contract import Artifact, GraphContract
from pleexport.errors import InputError, MissingDependencyError, TargetError, UnsupportedError
from pleexport.program import Program
from pleexport.staging import scratch_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pleexport.backends.executorch.session import ExecutorchSession
    from pleexport.checkpoint.matching import MatchedModel
    from pleexport.model import Model
    from pleexport.tied_layout import TiedLayout
    from pleexport.weights import WeightRequest

PROGRAM = "model.pte"
# The serializer's visitors are no public interface: only this version was tried.
VERSION = "1.5.1"
_PACKAGES = ("torch", "executorch")


class ExecutorchBackend:
    """See `backends.base.Backend`. What needs ExecuTorch is imported when it is used."""

    name = "executorch"
    conventions = Conventions(contract_id="pleexport.executorch/1", slot_axis=1)
    hidden_values_build = True

    def require(self) -> None:
        """See `Backend.require`."""
        try:
            found = importlib.metadata.version("executorch")
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found != VERSION:
            what = "which is not installed" if found is None else f"and {found} is installed"
            raise MissingDependencyError(
                f"the backend `executorch` needs executorch {VERSION}, {what}",
                hint="pip install 'pleexport[executorch]'",
            )

    def check(self, model: Model, request: WeightRequest) -> None:
        """See `Backend.check`."""
        if model.processor == "gpu":
            raise TargetError(
                "this target is for a GPU, and XNNPACK computes on CPUs",
                hint="choose another target, or build with `--backend onnx`",
            )
        if not request.symmetric:
            raise TargetError(
                "`--no-symmetric` asks for zero points, which XNNPACK's kernels do not have "
                "for groups of weights",
                hint="leave `--no-symmetric` out, or build with `--backend onnx`",
            )
        kept = (weight for weight in model.weights if request.keeps_codes(weight))
        if refusal := next(filter(None, map(refusal_of_codes, kept)), None):
            raise TargetError(
                refusal,
                hint="build with `--backend onnx`, or round anew with `--weight-dtype int4`",
            )
        if "fp16" in {request.dtype_of(weight) for weight in model.weights}:
            raise TargetError(
                "XNNPACK multiplies float32 by weights in fp32, int8 or int4, not fp16",
                hint="choose one of these, or build with `--backend onnx`",
            )
        if narrow := {cache.dtype for cache in model.caches} - {"fp32"}:
            raise TargetError(
                f"ExecuTorch's attention takes keys and values in fp32 only, not {narrow.pop()}",
                hint="add `--cache-dtype fp32`, or build with `--backend onnx`",
            )
        if any(table.whole_text for table in model.tables):
            raise TargetError(
                "an ExecuTorch program plans its memory for the rows of a call, not of a whole "
                "text, so keys and values have to be kept",
                hint="add `--cache-dtype fp32`, or build with `--backend onnx`",
            )
        if model.states:
            raise UnsupportedError(
                f"ExecuTorch has no operator for the recurrence of `{model.family}`, which would "
                "run token by token in single small operators",
                hint="build with `--backend onnx`",
            )
        if any(c.value_dim not in (None, c.head_dim) for c in model.caches):
            raise UnsupportedError(
                "ExecuTorch's attention needs values as wide as keys",
                hint="build with `--backend onnx`",
            )

    def storage(self, request: WeightRequest) -> WeightStorage:
        """How weights are stored."""
        return ExecutorchStorage(request)

    def bounds(self, contract: GraphContract, *, context: int) -> dict[str, int]:
        """All dynamic dimensions are limited, since memory is planned for them."""
        return bounds(contract, context=context)

    def planned_files(
        self, model: Model, storage: WeightStorage, *, tied: TiedLayout | None
    ) -> dict[str, int]:
        """Bytes of the program's weights; its structure is small."""
        return {PROGRAM: sum(storage.file_bytes(weight) for weight in model.weights)}

    def working_bytes(self, model: Model, storage: WeightStorage) -> int:
        """Matrices wait in files until all are there."""
        return sum(storage.file_bytes(weight) for weight in model.weights)

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
        """Write `model.pte`, and open it."""
        with undisturbed():
            from pleexport.backends.executorch.lower import lower
        from pleexport.backends.executorch.program import check_loads

        assert isinstance(storage, ExecutorchStorage)
        path = folder / PROGRAM
        digest = lower(
            program,
            matched,
            storage,
            path,
            results=program.results[:1],
            importance=importance,
            progress=progress,
        )
        check_loads(path)
        return Artifact(
            backend=self.name,
            contract=program.contract,
            files=[PROGRAM],
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
    ) -> ExecutorchSession:
        """Open a program; XNNPACK arranges its weights in memory."""
        self.require()
        check_threads(threads)
        if packed_weights is not None:
            raise InputError(
                "an ExecuTorch bundle keeps no packed weights: it arranges them when it is opened",
                hint="leave `--packed-weights` out",
            )
        if checksums:  # before it is loaded: a damaged program may end the process
            check_files([folder / name for name in artifact.files], checksums)
        from pleexport.backends.executorch.session import ExecutorchSession

        return ExecutorchSession(
            folder / PROGRAM, artifact.contract, context=context, threads=threads
        )

    def hidden_values(
        self,
        folder: Path,
        artifact: Artifact,
        vectors: Mapping[str, NDArray[np.float32]],
        count: int,
        *,
        original: Original,
    ) -> list[NDArray[np.float32]]:
        """By layer, what it hands on: of a second program, whose outputs are these.

        Its weights are rounded alike, unless a text was measured for that.
        """
        with undisturbed():
            from pleexport.backends.executorch.lower import lower
        from pleexport.backends.executorch.session import ExecutorchSession

        assert isinstance(original.storage, ExecutorchStorage)
        program = original.trace()
        with scratch_folder() as scratch:
            path = scratch / PROGRAM
            lower(
                program,
                original.matched,
                original.storage,
                path,
                results=program.hidden,
                importance={},
                progress=lambda _: None,
            )
            session = ExecutorchSession(
                path, artifact.contract, context=count, outputs=len(program.hidden)
            )
            return session.hidden(vectors, count)


BACKEND = ExecutorchBackend()
