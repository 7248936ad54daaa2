"""Open what a user names: a checkpoint, one with adapters, or the folder of an adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
from pleexport.checkpoint.remote import Remote, find_remote, open_checkpoint
from pleexport.errors import CheckpointError, InputError
from pleexport.model import Model
from pleexport.progress import Progress


def open_model(
    path: str | Path,
    *,
    adapters: Sequence[AdapterChoice] | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    weights: bool = True,
    progress: Progress | None = None,
) -> tuple[Checkpoint, Model]:
    """Open a checkpoint, merge adapters into it, and find its model.

    Args:
        path: a checkpoint, here or elsewhere, or the folder of an adapter.
        adapters: folders of adapters, or ids and URLs of such; "DIR:0.5"; pairs with a weight.
        base: of an adapter at `path`; what its config names by default.
        revision, token, offline: of a checkpoint that lies elsewhere; see `find_remote`.
        weights: whether those of a checkpoint elsewhere are fetched; adapters need them.
    Raises:
        InputError: adapters or a base that fit nothing.
        CheckpointError, UnsupportedError: folders that cannot be read or merged.
    """
    progress = progress or Progress(quiet=True)
    find = partial(find_remote, token=token, offline=offline)
    chosen = [
        _fetched(adapter, find(adapter.folder), progress) for adapter in choose_adapters(adapters)
    ]
    where, remote = path, find(path, revision=revision)
    own = _fetched(ChosenAdapter(path), remote, progress)
    if is_adapter(Path(own.folder)):
        chosen = [own, *chosen]
        where = _base_of(Path(own.folder)) if base is None else base
        remote = find(where)
    elif base is not None:
        raise InputError(
            f"`{path}` is no adapter, so it has no base `{base}`",
            hint="pass the base first, and the adapter with `--adapter DIR`",
        )
    if chosen and is_adapter(Path(where)):
        raise InputError(
            f"the base `{where}` is an adapter itself",
            hint="pass the model that it was trained on as the base, and both with `--adapter`",
        )
    # Before a base is fetched for them.
    opened = [Adapter(adapter) for adapter in chosen]
    checkpoint = open_checkpoint(
        where,
        remote,
        weights=weights or bool(opened),
        check=families.resolve,
        progress=progress,
    )
    model = families.resolve(checkpoint)
    if not opened:
        return checkpoint, model
    name = checkpoint.name if where == path else opened[0].name
    merged = merge_adapters(MatchedModel(model, checkpoint), opened, name=name)
    return merged, families.resolve(merged)


def _fetched(chosen: ChosenAdapter, remote: Remote | None, progress: Progress) -> ChosenAdapter:
    """An adapter's folder, fetched where an adapter lies elsewhere; anything else as it is."""
    if remote is None or not remote.holds_adapter:
        return chosen
    progress.note(f"note: there is no `{chosen.folder}` here; it is taken from {remote.store.url}")
    return replace(chosen, folder=remote.fetch(progress), name=remote.name)


def _base_of(adapter: Path) -> str:
    """The base that an adapter's config names, where it is a folder here or lies elsewhere.

    Raises:
        CheckpointError: it is neither.
    """
    named = Adapter(ChosenAdapter(adapter)).config.base
    if named and (Path(named).is_dir() or find_remote(named) is not None):
        return named
    said = f"names the base `{named}`, which is not here" if named else "names no base"
    raise CheckpointError(
        f"`{adapter}` is an adapter; its adapter_config.json {said}",
        hint="add `--base DIR` with the folder of the model that it was trained on",
    )
