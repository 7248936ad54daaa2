"""Open the folder of an adapter: its config, and its tensors by what they are to which module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.adapters.config import (
    ADAPTER_CONFIG,
    AS_SAVED,
    AdapterConfig,
    read_adapter_config,
)
from pleexport.checkpoint.adapters.names import Role, TensorName, read_name
from pleexport.checkpoint.checkpoint import WeightFile
from pleexport.checkpoint.digests import digest_of
from pleexport.checkpoint.pickled_file import PickledFile
from pleexport.dtypes import FLOATS
from pleexport.errors import CheckpointError, InputError, UnsupportedError
from pleexport.safetensors_file import SafetensorsFile

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"
_MODEL_CONFIG = "config.json"
AdapterChoice = str | Path | tuple[str | Path, float]


@dataclass(frozen=True)
class ChosenAdapter:
    """An adapter's folder, and how much of what it changes is wanted: 1.0 for all.

    Attributes:
        folder: a path; until it is fetched, an id or URL too.
        name: what people call it; the folder's name by default.
    """

    folder: str | Path
    weight: float = 1.0
    name: str | None = None


def choose_adapters(choices: Sequence[AdapterChoice] | None) -> list[ChosenAdapter]:
    """Folders and weights, of folders, of texts such as "DIR:0.5" and of pairs.

    Raises:
        InputError: a weight is not a finite number.
    """
    return [_choose(choice) for choice in choices or ()]


def _choose(choice: AdapterChoice) -> ChosenAdapter:
    if isinstance(choice, tuple):
        folder, weight = choice
    else:
        folder, weight = choice, 1.0
        before, colon, after = str(choice).rpartition(":")
        if colon and before and not Path(choice).exists():
            folder = before
            try:
                weight = float(after)
            except ValueError:
                folder = choice
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(
            f"the adapter `{folder}` has weight `{weight}`; expected a finite number",
            hint="write it like `--adapter DIR:0.5`",
        )
    return ChosenAdapter(folder, float(weight))


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, and no weights of a model."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    own = {ADAPTER_WEIGHTS, _PICKLED_WEIGHTS}
    models = {file.name for file in path.glob("*.safetensors")} - own
    return not models


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor, what its name says, and its values, which are read when they are used."""

    name: TensorName
    file: WeightFile

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.file.entries[self.name.full].shape

    def array(self) -> NDArray[Any]:
        """A view of it in its stored dtype."""
        return self.file.array(self.name.full)

    def vector(self) -> NDArray[np.float32]:
        """Its values in one dimension, in float32."""
        values: NDArray[np.float32] = self.array().reshape(-1).astype(np.float32)
        return values


class Adapter:
    """What one fine-tuning changes.

    Attributes:
        modules: by the name of a module in the model that was trained, its tensors.
    Raises:
        CheckpointError: no adapter, or a damaged one.
        UnsupportedError: it cannot be merged.
    """

    def __init__(self, chosen: ChosenAdapter) -> None:
        self.folder, self.weight = Path(chosen.folder), chosen.weight
        self._called = chosen.name
        if not self.folder.is_dir():
            raise CheckpointError(
                f"`{self.folder}` is no folder, so it is no adapter",
                hint=f"pass the folder that holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
            )
        self.config: AdapterConfig = read_adapter_config(self.folder)
        self._file = self._open()
        self.modules = self._modules()
        if self.config.dora and self.weight != 1.0:
            raise UnsupportedError(
                f"`{self.folder}` is a DoRA adapter, and a weight of {self.weight:g} has no "
                "meaning for the norms that it sets",
                hint="leave the weight out",
            )

    @property
    def name(self) -> str:
        """What people call it."""
        return self._called or self.folder.resolve().name

    @property
    def parameters(self) -> int:
        """Numbers in its file."""
        return sum(entry.size for entry in self._file.entries.values())

    def digest(self) -> str:
        """A digest of its config and its weights, "xxh3-128:" and hexadecimal digits."""
        return digest_of([self.folder / ADAPTER_CONFIG, self._file.path])

    def _open(self) -> WeightFile:
        safe, pickled = self.folder / ADAPTER_WEIGHTS, self.folder / _PICKLED_WEIGHTS
        if safe.is_file():
            return SafetensorsFile(safe, error=CheckpointError)
        if pickled.is_file():
            return PickledFile(pickled)
        raise CheckpointError(
            f"`{self.folder}` holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}",
            hint="fetch the file, or save the adapter again with `save_pretrained`; a trainer's "
            "own state cannot be merged",
        )

    def _modules(self) -> Mapping[str, dict[tuple[Role, str], AdapterTensor]]:
        names = [self._name(full, entry.dtype) for full, entry in self._file.entries.items()]
        saved = {name.module for name in names if name.role == "saved"}
        modules: dict[str, dict[tuple[Role, str], AdapterTensor]] = {}
        for name in names:
            role = name.role
            if name.is_plain and (name.module in saved or self.config.saves(name.module)):
                role = "saved"
            own = modules.setdefault(name.module, {})
            known = own.setdefault((role, name.leaf), AdapterTensor(name, self._file))
            again = self._file.array(name.full)
            if known.name != name and not np.array_equal(known.array(), again):
                raise CheckpointError(
                    f"`{self._file.path}` has both `{known.name.full}` and `{name.full}`, and they "
                    "differ",
                    hint="save one adapter into one folder",
                )
        if not modules:
            raise CheckpointError(f"`{self._file.path}` holds no tensors", hint=AS_SAVED)
        return modules

    def _name(self, full: str, dtype: str) -> TensorName:
        name = read_name(full)
        if name is None:
            raise CheckpointError(
                f"`{self._file.path}`: tensor `{full}` has no name that PEFT gives", hint=AS_SAVED
            )
        if dtype not in FLOATS:
            raise CheckpointError(
                f"`{self._file.path}`: tensor `{full}` has dtype {dtype}; expected one of "
                f"{', '.join(FLOATS)}",
                hint=AS_SAVED,
            )
        return name
