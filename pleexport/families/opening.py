"""Open what a user names: a checkpoint, one with adapters, or the folder of an adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pleexport import families
from pleexport.checkpoint.adapters.adapted import merge_adapters
from pleexport.checkpoint.adapters.adapter import (
    Adapter,
    AdapterChoice,
    ChosenAdapter,
    choose_adapters,
    is_adapter,
)
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError, InputError
from pleexport.model import Model


@dataclass(frozen=True)
class Opened:
    """A checkpoint and its model.

    Attributes:
        name: what a bundle is called after.
    """

    name: str
    checkpoint: Checkpoint
    model: Model


def open_model(
    path: str | Path,
    *,
    adapters: Sequence[AdapterChoice] | None = None,
    base: str | Path | None = None,
) -> Opened:
    """Open a checkpoint, and merge adapters into it.

    Args:
        path: a checkpoint, or the folder of an adapter.
        adapters: folders of adapters, "DIR:0.5", or pairs of folder and weight.
        base: of an adapter at `path`; what its config names by default.
    Raises:
        InputError: adapters or a base that fit nothing.
        CheckpointError, UnsupportedError: folders that cannot be read or merged.
    """
    chosen = choose_adapters(adapters)
    named, checkpoint_path = Path(path), Path(path)
    if is_adapter(named):
        chosen = [ChosenAdapter(named), *chosen]
        checkpoint_path = Path(base) if base is not None else _base_of(named)
    elif base is not None:
        raise InputError(
            f"`{path}` is no adapter, so it has no base `{base}`",
            hint="pass the base first, and the adapter with `--adapter DIR`",
        )
    if chosen and is_adapter(checkpoint_path):
        raise InputError(
            f"the base `{checkpoint_path}` is an adapter itself",
            hint="pass the model that it was trained on as the base, and both with `--adapter`",
        )
    checkpoint = Checkpoint(checkpoint_path)
    model = families.resolve(checkpoint)
    if not chosen:
        return Opened(checkpoint.name, checkpoint, model)
    opened = [Adapter(adapter) for adapter in chosen]
    merged = merge_adapters(MatchedModel(model, checkpoint), opened)
    return Opened(named.resolve().name, merged, families.resolve(merged))


def _base_of(adapter: Path) -> Path:
    """The base that an adapter's config names, where it is a folder here."""
    named = Adapter(ChosenAdapter(adapter)).config.base
    # A name on a hub is one too; what fetches it belongs here.
    if named and Path(named).is_dir():
        return Path(named)
    said = f"names the base `{named}`, which is no folder here" if named else "names no base"
    raise CheckpointError(
        f"`{adapter}` is an adapter; its adapter_config.json {said}",
        hint="add `--base DIR` with the folder of the model that it was trained on",
    )
