"""What stands in a folder: the files that weights are read from, and what the others are.

The order is that of transformers' `from_pretrained`: the file that config.json names, then
`model.safetensors`, then the shards of an index. Where two of them are there, the first is read,
and a note says so. Nothing is opened here but the index.

Source: transformers 5.23, `modeling_utils._get_resolved_checkpoint_files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pleexport.checkpoint import foreign
from pleexport.checkpoint.beside import (
    ADAPTER,
    EARLIER,
    PARTS,
    TRAINING,
    candidates,
    fits,
    listed,
    names_in,
    notes_beside,
)
from pleexport.checkpoint.index import INDEX, Index, lies_inside, read_index
from pleexport.errors import CheckpointError, PleexportError

CONFIG = "config.json"
WHOLE = "model.safetensors"
_NAMED_BY_CONFIG = "transformers_weights"
_NO_MODEL = "pass a folder that holds config.json and the safetensors files, or a .pth file"
_SHARDS_OF_A_DEVICE = "shard-?????-model-?????-of-?????.safetensors"
_BUNDLE = ("manifest.json", "embeddings.safetensors")


@dataclass(frozen=True)
class Contents:
    """What is read of a folder.

    Attributes:
        weights: names of the files; where two have the same tensor, the last counts.
        index: of the folder, whether or not its shards are read.
        as_transformers: `from_pretrained` reads these files too, and nothing else.
        notes: what is contradicted, and what is read.
    """

    weights: tuple[str, ...]
    index: Index | None = None
    as_transformers: bool = True
    notes: tuple[str, ...] = ()


def look_into(folder: Path, config: Mapping[str, Any]) -> Contents:
    """Find the files to read.

    Args:
        config: config.json; empty where there is none.
    Returns:
        no files where a folder has a config, and nothing that could be weights.
    Raises:
        CheckpointError, UnsupportedError: what stands there is no model, or cannot be told.
    """
    names = names_in(folder)
    _refuse_what_is_no_checkpoint(folder, names)
    index = folder / INDEX
    if config.get(_NAMED_BY_CONFIG) is not None:
        found = _named_by_config(folder, config[_NAMED_BY_CONFIG])
    elif (folder / WHOLE).is_file():
        found = Contents((WHOLE,), _index_beside(index))
    elif index.is_file():
        found = _of_index(folder, read_index(index), names)
    else:
        found = _alone(folder, names, has_config=bool(config))
    if not found.weights:
        return found
    notes = notes_beside(folder, names, found.weights, found.index)
    # With `peft`, from_pretrained adds an adapter that lies there.
    has_adapter = any(fits(name, ADAPTER) for name in names)
    return replace(
        found,
        as_transformers=found.as_transformers and not has_adapter,
        notes=(*found.notes, *notes),
    )


def _refuse_what_is_no_checkpoint(folder: Path, names: Sequence[str]) -> None:
    """Refuse a bundle, and weights that transformers would read in place of all others."""
    if all(name in names for name in _BUNDLE):
        raise CheckpointError(
            f"`{folder}` is a bundle that `pleexport build` wrote, not a checkpoint",
            hint="`pleexport run` runs it; to build again, pass the checkpoint it was built from",
        )
    if any(fnmatch(name, _SHARDS_OF_A_DEVICE) for name in names):
        raise CheckpointError(
            f"`{folder}` holds the parts of a distributed model (`shard-*.safetensors`), not whole "
            "tensors",
            hint="load it with `from_pretrained`, and save it again with `save_pretrained`",
        )


def _named_by_config(folder: Path, name: Any) -> Contents:
    if (
        not isinstance(name, str)
        or not lies_inside(name)
        or not name.endswith((".json", WHOLE[5:]))
    ):
        raise CheckpointError(
            f"`{folder / CONFIG}` has `{_NAMED_BY_CONFIG}` {name!r}; expected a safetensors file "
            "or index in the folder",
            hint="remove the field, so that model.safetensors is read",
        )
    note = f"`{CONFIG}` names `{name}` as the weights, which is read"
    if name.endswith(".json"):
        found = _of_index(folder, read_index(folder / name), [])
        return Contents(found.weights, found.index, as_transformers=False, notes=(note,))
    if not (folder / name).is_file():
        raise CheckpointError(
            f"`{folder / name}` does not exist, but `{CONFIG}` names it as the weights",
            hint="fetch the file, or remove `transformers_weights` from config.json",
        )
    return Contents((name,), as_transformers=False, notes=(note,))


def _index_beside(path: Path) -> Index | None:
    """The index beside a whole file, which nothing depends on."""
    try:
        return read_index(path) if path.is_file() else None
    except CheckpointError:
        return None


def _of_index(folder: Path, index: Index, names: Sequence[str]) -> Contents:
    """The shards of an index.

    Raises:
        CheckpointError: some are not there.
    """
    there = tuple(name for name in index.shards if (folder / name).is_file())
    gone = [name for name in index.text_shards if name not in there]
    if not gone:
        towers = [name for name in index.shards if name not in there]
        whole = index.has_metadata and not towers
        note = f"{listed(towers)} of `{INDEX}` is not there, and not needed: it holds no text model"
        return Contents(there, index, as_transformers=whole, notes=(note,) if towers else ())
    rest = [n for n in candidates(names, ("*.safetensors",)) if n not in index.shards]
    beside = f"; the folder has {listed(rest)}, which it does not list" if rest else ""
    raise CheckpointError(
        f"`{folder / gone[0]}` does not exist, but `{index.path.name}` lists it"
        f"{_and_more(gone)}{beside}",
        hint=f"if `{rest[0]}` is the whole model, name it `{WHOLE}`: it is read in place of shards"
        if len(rest) == 1
        else "fetch the missing shards, with the names that the index has",
    )


def _alone(folder: Path, names: Sequence[str], *, has_config: bool) -> Contents:
    """The one file that can be the weights, where none has the name that transformers looks for."""
    found = candidates(names, ("*.safetensors",))
    pickled = next((n for n in names if fnmatch(n, "pytorch_model*.bin")), None)
    if len(found) > 1:
        raise CheckpointError(
            f"`{folder}` holds {len(found)} safetensors files, {listed(found)}, and no `{INDEX}`",
            hint=f"fetch the index, or leave one file and name it `{WHOLE}`",
        )
    if found and has_config and not pickled:
        note = f"`{found[0]}` is read, the only weights there; transformers looks for `{WHOLE}`"
        return Contents((found[0],), as_transformers=False, notes=(note,))
    if found and not has_config:
        return Contents((found[0],))
    found = candidates(names, ("*.pth",))
    if len(found) > 1:
        raise CheckpointError(
            f"`{folder}` holds {len(found)} .pth files, {listed(found)}, and nothing says which "
            "one is the model",
            hint="save the model again as one file, with `model.save_pretrained(folder)`"
            if has_config
            else "pass the path of one of them, or leave one in the folder",
        )
    if found and not pickled:
        return Contents((found[0],), as_transformers=False)
    if problem := _what_else(folder, names, has_config=has_config):
        raise problem
    return Contents(())


def _what_else(folder: Path, names: Sequence[str], *, has_config: bool) -> PleexportError | None:
    """What a folder without weights holds in their place; None for a config alone."""
    for part in PARTS:
        if own := [name for name in names if fits(name, part.names)]:
            return CheckpointError(
                f"`{folder}` holds {part.what} (`{own[0]}`), not a model", hint=part.hint
            )
    if own := [name for name in names if fits(name, ADAPTER)]:
        return CheckpointError(
            f"`{folder}` holds an adapter (`{own[0]}`), not a whole model",
            hint=f"fetch adapter_config.json too; `pleexport build {folder}` then merges it into "
            "the base that it names",
        )
    if earlier := [n for n in names if fits(n, EARLIER) and (folder / n).is_dir()]:
        last = max(earlier, key=_step)
        return CheckpointError(
            f"`{folder}` holds the checkpoints of a training, {listed(earlier)}, and no model of "
            "its own",
            hint=f"pass one of them; the last is `{folder / last}`",
        )
    if other := foreign.first_named(n for n in names if not fits(n, TRAINING)):
        kind = foreign.recognized(folder / other)
        return kind.error(folder / other) if kind else None
    if has_config:
        return None
    return _nothing(folder, names)


def _nothing(folder: Path, names: Sequence[str]) -> PleexportError:
    if not names:
        return CheckpointError(f"`{folder}` is an empty folder", hint=_NO_MODEL)
    deeper = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")]
    if deeper:
        return CheckpointError(
            f"`{folder}` holds no model itself: `{folder / CONFIG}` does not exist",
            hint=f"pass the folder in it: `{deeper[0].parent}`",
        )
    return CheckpointError(
        f"`{folder}` holds no model: `{folder / CONFIG}` does not exist, and there are no weights",
        hint=_NO_MODEL,
    )


def _step(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _and_more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more that are not there" if len(names) > 1 else ""
