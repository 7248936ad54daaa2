"""Names of tensors that were saved from a wrapped module, without what the wrapper adds."""

from __future__ import annotations

from collections.abc import Iterable

from pleexport.errors import CheckpointError

# Modules that stand around another one, by the attribute that holds it.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """By the name that the model itself gives a tensor, the name in the files.

    Raises:
        CheckpointError: two tensors have one name then.
    """
    found: dict[str, str] = {}
    for name in names:
        own = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if own in found:
            raise CheckpointError(
                f"`{found[own]}` and `{name}` are the same tensor, saved from a wrapped module and "
                "from the model itself",
                hint="keep the files of one save only",
            )
        found[own] = name
    return found


def note_on_wrappers(names: dict[str, str]) -> list[str]:
    """That names are read without what wrappers add; nothing where there is none.

    Args:
        names: see `unwrapped`.
    """
    wrapped = [(own, name) for own, name in names.items() if own != name]
    if not wrapped:
        return []
    parts = {part for _, name in wrapped for part in name.split(".")}
    who = " and ".join(f"{WRAPPERS[part]} (`{part}.`)" for part in WRAPPERS if part in parts)
    own, name = wrapped[0]
    return [
        f"{len(wrapped)} tensors were saved with the prefix of {who}, and are read without it: "
        f"`{name}` as `{own}`"
    ]
