"""Open a trained checkpoint: its config, and its tensors by name, read when they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pleexport.checkpoint.pickled_file import PickledFile
from pleexport.dtypes import COMPUTED, torch_name
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.model import Rows
from pleexport.safetensors_file import SafetensorsFile, TensorEntry

GENERATION_CONFIG = "generation_config.json"
# What a config may name as its dtype, by the name it has there.
_CONFIG_DTYPES = {torch_name(name): name for name in COMPUTED}


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

    Raises:
        CheckpointError: nothing there, no config where there has to be one, or damaged files; the
            text names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        if self.path.is_file():
            self.folder, names = self.path.parent, [self.path.name]
        elif self.path.is_dir():
            self.folder, names = self.path, _weight_file_names(self.path)
            if not names or (self.path / "config.json").exists():
                self.config = _read_json(self.path / "config.json")
        else:
            raise CheckpointError(
                f"`{self.path}` does not exist",
                hint="pass the folder that holds config.json and the safetensors files, or a "
                ".pth file",
            )
        self.files: list[WeightFile] = [_open_weights(self.folder / name) for name in names]
        self._file_of: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self._file_of:
                    raise CheckpointError(
                        f"tensor `{name}` is in both `{self._file_of[name].path.name}` and "
                        f"`{file.path.name}`",
                        hint="keep the files of one save only",
                    )
                self._file_of[name] = file
        self._check_index()

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Shape, dtype and place of every tensor, by its name in the files."""
        return {name: file.entries[name] for name, file in self._file_of.items()}

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
        return _read_json(path) if path.exists() else {}

    @property
    def name(self) -> str:
        """What a bundle is called after."""
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem

    def array(self, name: str) -> NDArray[Any]:
        """Tensor `name` as a read-only view of the mapped file, in its stored dtype."""
        return self._file_of[name].array(name)

    def part(self, name: str, rows: Rows, columns: slice = slice(None)) -> NDArray[Any]:
        """Rows, and columns, of tensor `name` in its dtype; slices of a file's are views."""
        return cut(self.array(name), rows, columns)

    def _check_index(self) -> None:
        index_path = self.path / "model.safetensors.index.json"
        if not self.path.is_dir() or not index_path.exists():
            return
        missing = sorted(set(_read_json(index_path)["weight_map"]) - set(self._file_of))
        if missing:
            raise CheckpointError(
                f"`{index_path}` lists {len(missing)} tensors that are in no file, "
                f"`{missing[0]}` first",
                hint="fetch the shards again; they and the index belong together",
            )


def cut(array: NDArray[Any], rows: Rows, columns: slice) -> NDArray[Any]:
    """Rows of a tensor, and columns of one that has them; a number has neither."""
    if not array.ndim:
        return array
    found: NDArray[Any] = array[rows] if columns == slice(None) else array[rows, columns]
    return found


def _gguf(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"`{path}` holds GGUF, which is not read",
        hint="use the safetensors checkpoint that it was made from; for a form called "
        "`q4_0-gguf`, that is the one called `q4_0-unquantized`",
    )


def _open_weights(path: Path) -> WeightFile:
    if path.suffix == ".gguf":
        raise _gguf(path)
    if path.suffix == ".pth":
        return PickledFile(path)
    return SafetensorsFile(path, error=CheckpointError)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise CheckpointError(
            f"`{path}` does not exist",
            hint="a checkpoint folder holds config.json and the safetensors files",
        ) from err
    except OSError as err:
        raise CheckpointError(
            f"`{path}` cannot be read: {err.strerror}", hint="check the file and its permissions"
        ) from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            f"`{path}` is not valid JSON ({err})", hint="fetch the file again"
        ) from err
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object", hint="fetch the file again")
    return value


def _weight_file_names(folder: Path) -> list[str]:
    """Names of the weight files: the index's shards, or the only file there is."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise CheckpointError(
                f"`{index_path}` has no `weight_map` from tensor to file",
                hint="fetch the index again",
            )
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"`{index_path}` points outside the folder: `{name}`",
                    hint="do not use this checkpoint; a sound index names files beside it",
                )
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"`{folder / name}` does not exist, but `{index_path.name}` lists it",
                    hint="fetch the missing shard",
                )
        return names
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(
            f"`{folder}` holds {len(found)} safetensors files and no `{index_path.name}`",
            hint="fetch the index, or leave one file",
        )
    if not found:
        found = sorted(path.name for path in folder.glob("*.pth"))
        if len(found) > 1:
            raise CheckpointError(
                f"`{folder}` holds {len(found)} .pth files", hint="pass the path of one of them"
            )
    if not found and any(folder.glob("*.gguf")):
        raise _gguf(folder)
    if not found and any(folder.glob("*.bin")):
        raise CheckpointError(
            f"`{folder}` holds pickled weights (*.bin), which are not opened",
            hint="save it again with `model.save_pretrained(folder)`, which writes safetensors",
        )
    return found
