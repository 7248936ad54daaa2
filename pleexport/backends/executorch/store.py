"""The bytes of weights, made one at a time and kept in files until the `.pte` is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from executorch.exir._serialize._cord import FileBackedData
from numpy.typing import NDArray

from pleexport.backends.executorch.rounding import own_codes, round_matrix
from pleexport.backends.executorch.storage import ExecutorchStorage
from pleexport.checkpoint.matching import MatchedModel
from pleexport.codes import pack_codes
from pleexport.dtypes import QUANTIZED, bits, numpy_dtype
from pleexport.errors import CheckpointError
from pleexport.model import Weight
from pleexport.parallel import map_in_order

_BATCH_VALUES = 4 << 20


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix `[N, K]` as XNNPACK takes it.

    Attributes:
        group: weights that share a scale.
        data: float32 values, or codes of 8 or 4 bits; in a file.
        scales: empty for float32 values.
        scale_dtype: "fp32" of one scale an output, "bf16" of groups.
    """

    shape: tuple[int, ...]
    dtype: str
    group: int
    data: FileBackedData
    scales: bytes
    scale_dtype: str = "fp32"

    @property
    def scale_values(self) -> NDArray[np.float32]:
        """All scales, in float32."""
        return np.frombuffer(self.scales, numpy_dtype(self.scale_dtype)).astype(np.float32)


class WeightSource(Protocol):
    """What visitors ask for weights by name."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A weight in float32, of those that are small."""
        ...

    def matrix(self, name: str) -> StoredMatrix:
        """A matrix in its stored form."""
        ...


class WeightStore:
    """The weights of a checkpoint, each made when it is first asked for.

    Args:
        importance: by weight, see `round_matrix`; none for those that were not measured.
        folder: takes a file for each matrix.
        progress: called with the number of bytes made since its last call.
    """

    def __init__(
        self,
        matched: MatchedModel,
        storage: ExecutorchStorage,
        folder: Path,
        *,
        importance: Mapping[str, NDArray[np.float32]],
        progress: Callable[[int], object],
    ) -> None:
        self._matched = matched
        self._storage = storage
        self._folder = folder
        self._importance = importance
        self._progress = progress
        self._weights = {weight.name: weight for weight in matched.model.weights}
        self._matrices: dict[str, StoredMatrix] = {}
        self._digests: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """Of all weights that were asked for, as stored."""
        total = xxhash.xxh3_128()
        for name, digest in sorted(self._digests.items()):
            total.update(f"{name} {digest}\n".encode())
        return f"xxh3-128:{total.hexdigest()}"

    def vector(self, name: str) -> NDArray[np.float32]:
        """A weight in float32, of those that are small."""
        values = np.ascontiguousarray(self._matched.values(self._weights[name]), np.float32)
        if not np.isfinite(values).all():
            raise self._cannot_store(name, "values are not finite")
        if name not in self._digests:
            self._digests[name] = xxhash.xxh3_128_hexdigest(values.tobytes())
            self._progress(values.nbytes)
        return values

    def matrix(self, name: str) -> StoredMatrix:
        """A matrix in its stored form; made when it is first asked for.

        Raises:
            CheckpointError: it holds values that cannot be stored.
        """
        if name not in self._matrices:
            weight = self._weights[name]
            path = self._folder / f"{len(self._matrices)}.bin"
            digest, sha, scales = xxhash.xxh3_128(), hashlib.sha256(), []
            with path.open("wb") as file:
                for data, part in self._parts(weight):
                    file.write(data)
                    scales.append(part)
                    for state in (digest, sha):
                        state.update(data)
                    self._progress(len(data) + len(part))
            joined = b"".join(scales)
            digest.update(joined)
            self._digests[name] = digest.hexdigest()
            dtype = self._storage.dtype_of(weight)
            self._matrices[name] = StoredMatrix(
                shape=weight.shape,
                dtype=dtype,
                group=self._storage.group_of(weight) if dtype in QUANTIZED else 0,
                data=FileBackedData(str(path), sha256=sha.digest()),
                scales=joined,
                scale_dtype=self._storage.scale_dtype_of(weight),
            )
        return self._matrices[name]

    def _parts(self, weight: Weight) -> Iterator[tuple[bytes, bytes]]:
        """Some outputs of a matrix at a time: its bytes, and those of their scales."""
        dtype = self._storage.dtype_of(weight)
        scale_dtype = self._storage.scale_dtype_of(weight)
        step = max(1, _BATCH_VALUES // weight.shape[1])

        def part(begin: int) -> tuple[bytes, bytes]:
            rows = slice(begin, begin + step)
            if dtype not in QUANTIZED:
                values = self._matched.read(weight, rows)
                if not np.isfinite(values).all():
                    raise ValueError("values are not finite")
                return values.tobytes(), b""
            if self._storage.keeps_codes(weight):
                made = own_codes(self._matched.codes(weight, rows), scale_dtype=scale_dtype)
            else:
                made = round_matrix(
                    self._matched.read(weight, rows),
                    bits=bits(dtype),
                    group=self._storage.group_of(weight),
                    importance=self._importance.get(weight.name),
                )
            codes = pack_codes(made.codes, bits=bits(dtype))
            return codes.tobytes(), made.scales.astype(numpy_dtype(scale_dtype)).tobytes()

        try:
            yield from map_in_order(part, range(0, weight.shape[0], step))
        except ValueError as err:
            raise self._cannot_store(weight.name, str(err)) from err

    def _cannot_store(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"weight `{name}` cannot be stored as {self._storage.dtype_of(self._weights[name])}: "
            f"{why}",
            hint="check the checkpoint, or choose another weight dtype or backend",
        )


# ExecuTorch makes visitors itself and hands them nothing of ours: this is how the one lowering that
# runs tells them where its weights are.
_ACTIVE: ContextVar[WeightSource] = ContextVar("pleexport_weight_store")


@contextmanager
def asked_by_visitors(store: WeightSource) -> Iterator[None]:
    """Let visitors that run in the body ask this store."""
    token = _ACTIVE.set(store)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_store() -> WeightSource:
    """The store of the lowering that runs."""
    return _ACTIVE.get()
