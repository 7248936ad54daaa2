"""The families that are known, and how a config finds its own."""

from __future__ import annotations

from typing import Any

from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.quantized import mark_codes, read_quantization, refuse_side_files
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.families import (
    embformer,
    gemma3n,
    gemma4,
    lckv,
    llama_value_embeddings,
    rwkv,
)
from pleexport.families.config_reader import AS_PUBLISHED
from pleexport.model import Family, Model, UnconfiguredFamily

FAMILIES: tuple[Family, ...] = (gemma4, gemma3n, embformer, lckv, llama_value_embeddings)
UNCONFIGURED: tuple[UnconfiguredFamily, ...] = (rwkv,)

# Model types that look like a family and hold no lookup tables, with the reason to give.
WITHOUT_TABLES = {
    "embedding_gemma2": "its per-layer inputs are projections only; it has no lookup tables",
    "gemma4_unified": "it has no per-layer embedding tables",
    "gemma4_assistant": "it has no per-layer embedding tables",
    "diffusion_gemma": "it has no per-layer embedding tables",
}


def resolve(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint, from its config.json or else from its tensors.

    Raises:
        UnsupportedError: no family is responsible, or the model has no tables.
        CheckpointError: the config is incomplete or malformed, or the shapes do not fit.
    """
    if checkpoint.config:
        refuse_side_files(checkpoint)
        quantization = read_quantization(checkpoint.config)
        configured = from_config(checkpoint.config, dtype=checkpoint.dtype)
        return mark_codes(configured, quantization, checkpoint) if quantization else configured
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    for family in UNCONFIGURED:
        if (model := family.recognize(shapes)) is not None:
            return model
    raise UnsupportedError(
        f"`{checkpoint.path}` has no config.json, and its tensors are of no family that goes "
        "without one",
        hint="pass the folder that holds config.json, not a file in it",
    )


def from_config(config: dict[str, Any], *, dtype: str) -> Model:
    """The model that a config.json describes.

    Args:
        dtype: the checkpoint's dtype, "fp32", "fp16" or "bf16".
    Raises:
        UnsupportedError: no family is responsible, or the model has no tables.
        CheckpointError: the config is incomplete or malformed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: `model_type` is {model_type!r}; expected a name", hint=AS_PUBLISHED
        )
    for family in FAMILIES:
        if model_type in family.MODEL_TYPES:
            return family.configure(config, dtype=dtype)
    if model_type in WITHOUT_TABLES:
        raise UnsupportedError(
            f"config.json: model type `{model_type}` is not supported: "
            f"{WITHOUT_TABLES[model_type]}",
            hint="use a general exporter for it",
        )
    known = ", ".join(name for family in FAMILIES for name in family.MODEL_TYPES)
    raise UnsupportedError(
        f"config.json: model type `{model_type}` is not supported; known: {known}",
        hint="docs/adding-a-family.md says what a new family takes",
    )
