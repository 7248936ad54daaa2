"""The index of shards: which file a tensor is said to be in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pleexport.checkpoint.json_file import read_json
from pleexport.errors import CheckpointError

INDEX = "model.safetensors.index.json"
# In the names of a multimodal model's language model, whatever stands around it.
_TEXT = "language_model."


@dataclass(frozen=True)
class Index:
    """An index as the file has it; what it says of tensors may not be so.

    Attributes:
        weight_map: by tensor, the file.
        has_metadata: it has an object `metadata`, which transformers asks for.
    """

    path: Path
    weight_map: Mapping[str, str]
    has_metadata: bool

    @property
    def shards(self) -> list[str]:
        """The files, in the order in which transformers reads them."""
        return sorted(set(self.weight_map.values()))

    @property
    def text_shards(self) -> list[str]:
        """The shards with a part of the language model; others hold towers, which are left out."""
        text = {file for name, file in self.weight_map.items() if _is_of_text(name)}
        named = any(_TEXT in name for name in self.weight_map)
        return sorted(text) if named else self.shards


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        CheckpointError: no index, or one that names files elsewhere.
    """
    values = read_json(path)
    weight_map = values.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(
            f"`{path}` has no `weight_map` from tensor to file", hint="fetch the index again"
        )
    for name in sorted(set(weight_map.values())):
        if not lies_inside(name):
            raise CheckpointError(
                f"`{path}` points outside the folder: `{name}`",
                hint="do not use this checkpoint; a sound index names files beside it",
            )
    return Index(path, weight_map, isinstance(values.get("metadata"), dict))


def lies_inside(name: str) -> bool:
    """Whether a file's name leads to no place outside of the folder it is looked for in."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (
        PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name
    )


def _is_of_text(name: str) -> bool:
    return _TEXT in name or name.endswith("lm_head.weight")
