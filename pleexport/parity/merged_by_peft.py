"""Let `peft` merge adapters into the original, where it is installed and can: it is a witness.

`peft` finds modules by their names, and needs whatever is merged in memory as a whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pleexport.checkpoint.adapters.adapted import AdaptedCheckpoint
from pleexport.checkpoint.adapters.adapter import Adapter
from pleexport.checkpoint.adapters.names import key_of

# What may be in memory of merged tensors; PEFT's sums are in float32 beside them.
MERGED_BYTES = 2 << 30


def can_merge(checkpoint: AdaptedCheckpoint) -> bool:
    """Whether `peft` is here and merges these adapters in bounded memory.

    Names have to be those of the text model alone. A vocabulary has to be the base's: other rows
    than an adapter holds would be random. In 16 bits a tensor has to change once, since `peft`
    rounds it after each change.
    """
    if importlib.util.find_spec("peft") is None:
        return False
    if checkpoint.dtype != "fp32" and checkpoint.changed_repeatedly:
        return False
    shapes = checkpoint.base.entries
    same_rows = all(
        name not in shapes or shapes[name].shape == tensor.entry.shape
        for name, tensor in checkpoint.merged.items()
    )
    small = sum(tensor.entry.nbytes for tensor in checkpoint.merged.values()) <= MERGED_BYTES
    return same_rows and small and all(_has_plain_names(a) for a in checkpoint.adapters)


def writable(tensors: Mapping[str, Tensor], checkpoint: AdaptedCheckpoint) -> dict[str, Tensor]:
    """The same tensors, with copies of those that are merged: views of a file cannot be."""
    return {
        name: tensor.clone() if name in checkpoint.merged else tensor
        for name, tensor in tensors.items()
    }


def merge(model: Any, checkpoint: AdaptedCheckpoint) -> tuple[Any, str]:
    """A model with a checkpoint's adapters merged, one after the other, and who merged them."""
    import peft
    from peft.tuners.lora import LoraLayer

    for adapter in checkpoint.adapters:
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter.folder))
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                for name in module.scaling:
                    module.scaling[name] *= adapter.weight
        model = wrapped.merge_and_unload()
    return model, f"peft {peft.__version__}"


def _has_plain_names(adapter: Adapter) -> bool:
    """Whether modules are called what the text model alone calls them, in PEFT's own spelling."""
    return all(
        module == (stem if stem == "lm_head" else f"model.{stem}")
        and all(
            tensor.name.full.startswith(f"base_model.model.{module}.")
            for tensor in tensors.values()
        )
        for module, tensors in adapter.modules.items()
        for stem in [key_of(module)]
    )
