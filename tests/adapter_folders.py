"""Adapters as `peft` saves them, for random checkpoints, and what `peft` makes of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
MODEL = "model.safetensors"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PER_LAYER = ["per_layer_model_projection", "per_layer_input_gate", "per_layer_projection"]


def save_adapter(
    base: Path,
    folder: Path,
    *,
    rows: int | None = None,
    seed: int = 0,
    kind: Any = transformers.AutoModelForCausalLM,
    config: PeftConfig | None = None,
    **fields: Any,
) -> Path:
    """Train an adapter by chance, and save it.

    Args:
        rows: ids of the vocabulary, where the model was resized before.
        kind: how transformers loads the base.
        config: of another kind of adapter than LoRA.
        fields: of peft's LoraConfig.
    """
    with _quiet():
        config = config or LoraConfig(task_type="CAUSAL_LM", **fields)
        model = get_peft_model(_load(base, rows, kind), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_((0.1 * noise).to(parameter.dtype))
        model.save_pretrained(folder)
    return folder


def merge_with_peft(
    base: Path,
    *adapters: tuple[Path, float] | Path,
    rows: int | None = None,
    kind: Any = transformers.AutoModelForCausalLM,
) -> Any:
    """The original with adapters merged by peft, one after the other."""
    with _quiet():
        model = _load(base, rows, kind)
        for adapter in adapters:
            folder, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
            wrapped = PeftModel.from_pretrained(model, folder)
            for module in wrapped.modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] *= weight  # `scale_layer` leaves lookups out
            model = wrapped.merge_and_unload()
    return model.eval()


def concatenate_with_peft(base: Path, folders: Sequence[Path], weights: Sequence[float]) -> Any:
    """The original with a weighted adapter of several merged."""
    names = [folder.name for folder in folders]
    with _quiet():
        model = _load(base, None, transformers.AutoModelForCausalLM)
        wrapped = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        for folder in folders[1:]:
            wrapped.load_adapter(folder, adapter_name=folder.name)
        wrapped.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
        wrapped.set_adapter("sum")
        return wrapped.merge_and_unload().eval()


def logits_of(model: Any) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """A function from ids to the logits of a model, which is widened to float32."""
    model = model.float()

    def logits(ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].numpy()
        return found

    return logits


def rewrite_config(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_tensors(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    name: str = WEIGHTS,
) -> None:
    """Change the tensors of a file of an adapter or a model."""
    save_file(change(load_file(folder / name)), folder / name)


def _load(base: Path, rows: int | None, kind: Any) -> Any:
    model = kind.from_pretrained(base, dtype="auto")
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what peft and transformers warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
