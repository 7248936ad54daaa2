"""Open a trained checkpoint: its config, and its tensors by name, read when they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pleexport.checkpoint.beside import notes_on_index, others
from pleexport.checkpoint.folder import CONFIG, Contents, look_into
from pleexport.checkpoint.foreign import refuse_foreign, refuse_text
from pleexport.checkpoint.index import INDEX
from pleexport.checkpoint.json_file import read_json
from pleexport.checkpoint.pickled_file import PickledFile
from pleexport.checkpoint.wrappers import note_on_wrappers, unwrapped
from pleexport.dtypes import COMPUTED, torch_name
from pleexport.errors import CheckpointError
from pleexport.model import Rows
from pleexport.safetensors_file import SafetensorsFile, TensorEntry

GENERATION_CONFIG = "generation_config.json"
# What a config may name as its dtype, by the name it has there.
_CONFIG_DTYPES = {torch_name(name): name for name in COMPUTED}


@dataclass(frozen=True)
class Repository:
    """Where on the Hugging Face hub a checkpoint comes from: `owner/name`, and a commit."""

    name: str
    commit: str


class WeightFile(Protocol):
    """A file of tensors."""

    path: Path
    entries: dict[str, TensorEntry]

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor in its stored dtype."""
        ...


class Checkpoint:
    """Trained weights with their config.

    Either a Hugging Face folder, `config.json` and safetensors files, single or sharded; or one
    file, `.pth` or safetensors, of a family that has no config, or the folder around it. Weights
    are optional: a folder that has only a config can be inspected.

    Args:
        weights: otherwise only the config is opened.
        name: what a bundle is called after; that of the folder or file by default.
        repository: where it was fetched from, if it was.
    Attributes:
        notes: what contradicts itself in the folder, and what is read; for people.
        read_by_transformers: `from_pretrained` finds the same tensors in the folder, by the same
            names, and nothing else.
    Raises:
        CheckpointError: nothing there, no config where there has to be one, or damaged files; the
            text names the file.
        UnsupportedError: weights in a format that is not read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        weights: bool = True,
        name: str | None = None,
        repository: Repository | None = None,
    ) -> None:
        self.path = Path(path)
        self._name = name
        self.repository = repository
        self.config: dict[str, Any] = {}
        if self.path.is_file():
            self.folder, contents = self.path.parent, Contents((self.path.name,))
        elif self.path.is_dir():
            self.folder = self.path
            self.config = _read_config(self.path / CONFIG)
            contents = look_into(self.path, self.config) if weights else Contents(())
        else:
            raise CheckpointError(
                f"`{self.path}` does not exist",
                hint="pass the folder that holds config.json and the safetensors files, or a "
                ".pth file",
            )
        self.files: list[WeightFile] = [
            _open_weights(self.folder / name) for name in contents.weights
        ]
        by_name, twice = _by_name(self.files)
        self._names = unwrapped(by_name)
        self._file_of = {own: by_name[name] for own, name in self._names.items()}
        wrappers = note_on_wrappers(self._names)
        self.read_by_transformers = contents.as_transformers and not wrappers
        index = contents.index
        self.notes: list[str] = [
            *contents.notes,
            *(notes_on_index(index, by_name, self.folder, contents.weights) if index else ()),
            *twice,
            *wrappers,
        ]

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Shape, dtype and place of every tensor, by its name without what wrappers add."""
        return {
            name: replace(file.entries[self._names[name]], name=name)
            for name, file in self._file_of.items()
        }

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def dtype(self) -> str:
        """The dtype that the original computes its constants in: "fp32", "fp16" or "bf16".

        The config's word comes first, as in `from_pretrained(dtype="auto")`; a config without one
        takes the dtype of the first floating-point tensor. Without a config, it is that of all
        tensors, or "fp32" where they differ.
        """
        for config in (self.config, self.text_config):
            name = config.get("dtype") or config.get("torch_dtype")
            if name is None:
                continue
            if not isinstance(name, str) or name not in _CONFIG_DTYPES:
                raise CheckpointError(
                    f"`{self.path / 'config.json'}` has dtype `{name}`; "
                    f"expected one of {', '.join(_CONFIG_DTYPES)}",
                    hint="save the model again in one of these",
                )
            return _CONFIG_DTYPES[name]
        if not self.config:
            dtypes = {entry.dtype for entry in self.entries.values()}
            return dtypes.pop() if dtypes in ({"fp16"}, {"bf16"}) else "fp32"
        floats = [e.dtype for e in self.entries.values() if e.dtype in COMPUTED]
        return floats[0] if floats else "fp32"

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`, or an empty dict."""
        path = self.folder / GENERATION_CONFIG
        return read_json(path) if path.exists() else {}

    @property
    def name(self) -> str:
        """What a bundle is called after."""
        if self._name:
            return self._name
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem

    def array(self, name: str) -> NDArray[Any]:
        """Tensor `name` as a read-only view of the mapped file, in its stored dtype."""
        return self._file_of[name].array(self._names[name])

    def part(self, name: str, rows: Rows, columns: slice = slice(None)) -> NDArray[Any]:
        """Rows, and columns, of tensor `name` in its dtype; slices of a file's are views."""
        return cut(self.array(name), rows, columns)

    def renamed(self, old: str, new: str, *, note: str) -> Checkpoint:
        """The same files, with another name for a tensor, and a note on that."""
        other = copy(self)
        other.__dict__.pop("entries", None)  # it is made from the names
        other._names = {new if own == old else own: name for own, name in self._names.items()}
        other.notes = [*self.notes, note]
        other._file_of = {new if own == old else own: f for own, f in self._file_of.items()}
        return other

    def others(self, read: Iterable[str] = ()) -> dict[str, list[str]]:
        """By what they are, the files and folders beside the weights that nothing is read from.

        Args:
            read: names of files that somebody else reads.
        """
        if not self.path.is_dir():
            return {}
        own = [Path(file.path).relative_to(self.folder).parts[0] for file in self.files]
        if len(own) > 1:
            own.append(INDEX)
        return others(self.folder, {*own, *read, CONFIG, GENERATION_CONFIG})


def cut(array: NDArray[Any], rows: Rows, columns: slice) -> NDArray[Any]:
    """Rows of a tensor, and columns of one that has them; a number has neither."""
    if not array.ndim:
        return array
    found: NDArray[Any] = array[rows] if columns == slice(None) else array[rows, columns]
    return found


def _by_name(files: Iterable[WeightFile]) -> tuple[dict[str, WeightFile], list[str]]:
    """Where each tensor is, and a note on those that are in two files: the last counts."""
    found: dict[str, WeightFile] = {}
    twice = []
    for file in files:
        for name in file.entries:
            if name in found:
                twice.append((name, found[name].path.name, file.path.name))
            found[name] = file
    if not twice:
        return found, []
    name, first, last = twice[0]
    what = f"`{name}` is" if len(twice) == 1 else f"`{name}` and {len(twice) - 1} more tensors are"
    return found, [f"{what} in both `{first}` and `{last}`; the latter is read, as in transformers"]


def _open_weights(path: Path) -> WeightFile:
    of_torch = path.suffix == ".pth"
    if path.suffix == ".json":
        raise CheckpointError(
            f"`{path}` is a JSON file, not weights", hint="pass the folder that holds it"
        )
    refuse_foreign(path, of_torch=of_torch)
    refuse_text(path)
    return PickledFile(path) if of_torch else SafetensorsFile(path, error=CheckpointError)


def _read_config(path: Path) -> dict[str, Any]:
    """config.json, or an empty dict where there is none."""
    if not path.exists():
        return {}
    config = read_json(path)
    if not config:
        raise CheckpointError(
            f"`{path}` is an empty object: it says nothing of the model",
            hint="fetch the file again, as the model was published with it",
        )
    return config
