"""What every backend answers: how it stores weights, what it writes, and how that is run.

A backend is one runtime format. It is one folder, `backends/NAME`, whose module `backend` has an
object `BACKEND`, and one line in `registry.NAMES`. Nothing here imports torch, a family or a
checkpoint: a process that only runs a bundle loads this module too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from numpy.typing import NDArray

from pleexport.checksums import Checksums
from pleexport.contract import Artifact, GraphContract
from pleexport.errors import InputError
from pleexport.program import Program

if TYPE_CHECKING:
    import numpy as np

    from pleexport.checkpoint.matching import MatchedModel
    from pleexport.model import Codes, Model, Weight
    from pleexport.tied_layout import TiedLayout
    from pleexport.weights import WeightRequest

_MOST_THREADS = 256


@dataclass(frozen=True)
class Conventions:
    """What a backend's graphs have in common.

    Attributes:
        contract_id: names the meaning of every input and output.
        slot_axis: where the slots of a cache stand in `[1, heads, width]`.
    """

    contract_id: str
    slot_axis: int


@dataclass(frozen=True)
class Original:
    """What a bundle was built from, for a backend that has to build from it once more.

    Attributes:
        trace: traces the model.
    """

    matched: MatchedModel
    storage: WeightStorage
    trace: Callable[[], Program]


class WeightStorage(Protocol):
    """How a backend stores dense weights."""

    def dtype_of(self, weight: Weight) -> str:
        """The dtype that one weight is stored in."""
        ...

    def file_bytes(self, weight: Weight) -> int:
        """Bytes in the graph's files."""
        ...

    def resident_bytes(self, weight: Weight) -> int:
        """Bytes in memory once loaded."""
        ...

    def row_codes(self, weight: Weight) -> Codes | None:
        """How a matrix is stored whose file can be looked up in, as docs/blob-format.md says.

        None where a table of the same numbers needs rows of its own.
        """
        ...

    def notes(self, model: Model) -> list[str]:
        """What it stores otherwise than was asked for, a sentence each."""
        ...


class Session(Protocol):
    """An open graph with the caches and states of one text.

    Attributes:
        chunk: most tokens of one call.
    """

    chunk: int

    def feed(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int, *, keep: int
    ) -> NDArray[np.float32]:
        """Logits `[n, vocab]` after the next `count` tokens.

        Args:
            vectors: by graph input, see `GraphContract.cut`.
            keep: n, how many of the last positions want logits; 0 for all.
        """
        ...

    def rewind(self, count: int) -> int:
        """Forget the last tokens of the last `feed`; once for each.

        Args:
            count: 1 or more, and fewer than that `feed` had.
        Returns:
            how many tokens were forgotten: `count`, or all of that `feed` where only what was held
            before it is still known. Those that were not meant to be have to be fed again.
        """
        ...

    def reset(self) -> None:
        """Forget the text so far."""
        ...


class Backend(Protocol):
    """One runtime format.

    Attributes:
        hidden_values_build: hidden values take as long as a build, since the file that ships cannot
            be made to give them.
    """

    name: str
    conventions: Conventions
    hidden_values_build: bool

    def require(self) -> None:
        """Refuse to go on where packages that it needs beside its own are not installed.

        Raises:
            MissingDependencyError: names them, and the command that installs them.
        """
        ...

    def check(self, model: Model, request: WeightRequest) -> None:
        """Refuse what it cannot store or compute, before any work.

        Raises:
            TargetError: another choice of dtypes would do.
            UnsupportedError: it cannot compute such a model.
        """
        ...

    def storage(self, request: WeightRequest) -> WeightStorage:
        """How it stores the weights of a build."""
        ...

    def bounds(self, contract: GraphContract, *, context: int) -> dict[str, int]:
        """By dynamic dimension of its graphs, the largest size; of those that are limited."""
        ...

    def planned_files(
        self, model: Model, storage: WeightStorage, *, tied: TiedLayout | None
    ) -> dict[str, int]:
        """Bytes of its large files by name.

        Args:
            tied: the matrix that gets a file of its own, `tied.safetensors`; one of `row_codes`.
        """
        ...

    def working_bytes(self, model: Model, storage: WeightStorage) -> int:
        """Bytes on the disk that `lower` takes beside its files, and gives back."""
        ...

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
        """Write a program and its weights to a folder.

        Args:
            tied: as in `planned_files`.
            importance: by weight, how much each input counts; for those that were measured.
            progress: called with the number of bytes written since its last call.
        Raises:
            CheckpointError: a weight holds values that cannot be stored.
        """
        ...

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
    ) -> Session:
        """Open what `lower` wrote.

        Args:
            context: largest number of positions.
            threads: 0 for one a core.
            spin: whether threads spin while they wait; of no meaning where a runtime has no choice.
            packed_weights: a folder that keeps weights arranged for this processor.
            checksums: of the files; None to compare nothing.
        Raises:
            InputError: an impossible number of threads, or a folder that cannot be used.
            BundleError: the files cannot be loaded, or contradict the contract.
            CheckFailed: a file does not match its checksums.
        """
        ...

    def hidden_values(
        self,
        folder: Path,
        artifact: Artifact,
        vectors: Mapping[str, NDArray[np.float32]],
        count: int,
        *,
        original: Original,
    ) -> list[NDArray[np.float32]]:
        """By layer, what it hands on, `[T, ...]`, for a text from its start.

        Args:
            vectors: by graph input, an entry for each token.
            count: T.
        """
        ...


def check_threads(threads: int) -> None:
    """Refuse a number of threads that no machine has.

    Raises:
        InputError: it is out of range.
    """
    if not 0 <= threads <= _MOST_THREADS:
        raise InputError(
            f"threads is {threads}; it must be 0 to {_MOST_THREADS}",
            hint="0 takes one for each core",
        )
