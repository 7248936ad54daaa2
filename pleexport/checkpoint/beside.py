"""What stands beside a checkpoint's weights: what it is, and what is said of it.

Nothing is read from it. Some of it contradicts what is read, and is told before any work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pleexport.checkpoint import foreign
from pleexport.checkpoint.index import INDEX, Index
from pleexport.errors import CheckpointError

_MANY = 4
# Files of one download are not as old as each other; a training takes longer.
_SECONDS_APART = 3600
# What a training keeps for itself, and adapters: never a model's own weights, whatever they hold.
TRAINING = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "training_args*",
    "trainer_state.json",
    "trainer_log.jsonl",
    "train_results.json",
    "all_results.json",
    "eval_results.json",
    "runs",
    "latest",
    "zero_to_fp32.py",
    "global_step*",
    "*_optim_states.pt",
)
ADAPTER = ("adapter_model*.safetensors", "adapter_model*.bin", "adapter_config.json")
# What the note on one begins with.
ADAPTER_BESIDE = "an adapter lies beside the model"
EARLIER = ("checkpoint-*",)
# What holds a model's weights, under whatever name.
_WEIGHTS = ("*.safetensors", "*.pth", "pytorch_model*.bin")
_OTHER = "other files"


@dataclass(frozen=True)
class Parts:
    """What a training on several devices leaves in place of a model.

    Attributes:
        what: as in "holds ..., not a model".
        names: patterns of its files and folders.
    """

    what: str
    names: tuple[str, ...]
    hint: str


PARTS = (
    Parts(
        "the parts that DeepSpeed saves on each device",
        ("global_step*", "mp_rank_*", "*zero_pp_rank_*", "zero_to_fp32.py"),
        "join them: `python zero_to_fp32.py . joined --safe_serialization` in the folder that has "
        "that script, then copy config.json and the tokenizer into `joined`",
    ),
    Parts(
        "the parts that FSDP saves on each device",
        ("pytorch_model_fsdp_*", "*.distcp", ".metadata"),
        "join them: `accelerate merge-weights pytorch_model_fsdp_0 joined`, then copy config.json "
        "and the tokenizer into `joined`",
    ),
    Parts(
        "the parts that Megatron saves on each device",
        ("latest_checkpointed_iteration.txt", "iter_???????"),
        "convert it with the library that trained it to a Hugging Face folder",
    ),
)


def notes_beside(
    folder: Path, names: Sequence[str], read: Sequence[str], index: Index | None
) -> list[str]:
    """Weights and adapters that are there too, and are not read.

    Args:
        names: all that the folder holds.
        read: names of the files that are read; not empty.
        index: of the folder, which has a note of its own.
    """
    told = {*read, *(index.shards if index else ())}
    more = [name for name in candidates(names, _WEIGHTS) if name not in told]
    notes = []
    if more:
        newer = ", although newer" if _is_newer(folder, more, read) else ""
        notes.append(
            f"{listed(more)} beside `{read[0]}` {'is' if len(more) == 1 else 'are'} not read, as "
            f"in transformers{newer}"
        )
    if adapter := [name for name in names if fits(name, ADAPTER)]:
        notes.append(
            f"{ADAPTER_BESIDE} ({listed(adapter)}), and is not merged: the model "
            f"is read as it is; `--adapter {folder}` merges it, if that has not been done"
        )
    return notes


def notes_on_index(
    index: Index, entries: Iterable[str], folder: Path, read: Sequence[str]
) -> list[str]:
    """What the index of a folder says, and the files do not.

    Args:
        entries: names of all tensors that were found, as the files have them.
        read: names of the files that are read.
    """
    found, named = {*entries}, index.weight_map
    shards = [name for name in index.shards if name not in read]
    if not shards:
        missing = sorted(named.keys() - found)
        if not missing:
            return []
        what = _tensors(missing)
        return [f"`{index.path.name}` lists {what} in no file; what the files have counts"]
    here = [name for name in shards if (folder / name).is_file()]
    if not here:
        return [
            f"`{index.path.name}` is not read: its {len(shards)} shards are gone, and `{read[0]}` "
            "is there"
        ]
    only = sorted(named.keys() - found) or sorted(found - named.keys())
    differ = (
        f"they hold different tensors, {_first(only)}" if only else "tensors have the same names"
    )
    newer = ", and the shards are newer" if _is_newer(folder, here, read) else ""
    return [
        f"`{read[0]}` is read, and the {len(here)} shards of `{index.path.name}` beside it are "
        f"not, as in transformers; {differ}{newer}: remove what is old"
    ]


def others(folder: Path, read: Iterable[str]) -> dict[str, list[str]]:
    """By what they are, the files and folders that nothing is read from.

    Args:
        read: names of those that something is read from.
    """
    found: dict[str, list[str]] = {}
    taken = {*read}
    for name in names_in(folder):
        if name not in taken:
            found.setdefault(_called(name), []).append(name)
    return dict(sorted(found.items(), key=lambda item: item[0] == _OTHER))


def _called(name: str) -> str:
    if fits(name, ADAPTER):
        return "an adapter, not merged"
    if fits(name, TRAINING):
        return "state of a training"
    if fits(name, EARLIER):
        return "earlier checkpoints"
    for part in PARTS:
        if fits(name, part.names):
            return part.what
    kind = foreign.named(name)
    if kind is not None:
        return kind.what
    if name == INDEX or fnmatch(name, "*.bin.index.json"):
        return "an index of shards that are not read"
    return "other weights" if fnmatch(name, "*.safetensors") or fnmatch(name, "*.pth") else _OTHER


def names_in(folder: Path) -> list[str]:
    """Names of all files and folders in a folder."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as err:
        raise CheckpointError(
            f"`{folder}` cannot be read: {err.strerror}", hint="check the folder's permissions"
        ) from err


def candidates(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names that fit, those of adapters and of a training's state left out."""
    return [n for n in names if fits(n, patterns) and not fits(n, (*ADAPTER, *TRAINING))]


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of some patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first few of many."""
    shown = ", ".join(f"`{name}`" for name in names[:_MANY])
    return shown if len(names) <= _MANY else f"{shown} and {len(names) - _MANY} more"


def _is_newer(folder: Path, some: Iterable[str], others: Iterable[str]) -> bool:
    return _written(folder, some) > _written(folder, others) + _SECONDS_APART


def _written(folder: Path, names: Iterable[str]) -> float:
    """When the last of some files was written; 0 where that cannot be told."""
    files = (folder / name for name in names)
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _tensors(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"tensor `{names[0]}`, which is"
    return f"{len(names)} tensors, `{names[0]}` first, that are"


def _first(names: Sequence[str]) -> str:
    return f"`{names[0]}`{' first' if len(names) > 1 else ''}"
