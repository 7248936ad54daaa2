"""Random checkpoints that the package compressed-tensors has quantized and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import GEMMA4
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

# What a group of 16 or 32 divides.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "hidden_size_per_layer_input": 32}
WIDE |= {"head_dim": 16, "global_head_dim": 32}


def weights(bits: int = 4, group_size: int | None = 32, **changes: Any) -> dict[str, Any]:
    """How the matrices of a group are held."""
    strategy = "channel" if group_size is None else "group"
    fields = {"num_bits": bits, "group_size": group_size, "strategy": strategy}
    return fields | {"type": "int", "symmetric": True, "dynamic": False} | changes


# Attention and feed-forward parts in groups of 32, everything else in numbers.
W4A16: dict[str, Any] = {"group_0": {"targets": ["Linear"], "weights": weights()}}
W4A16_IGNORED = ["lm_head", "re:.*per_layer.*"]


def packed_gemma4(
    folder: Path,
    *,
    groups: dict[str, Any] = W4A16,
    ignore: list[str] = W4A16_IGNORED,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Path:
    """Save a random Gemma 4, `GEMMA4 | WIDE` changed by `changes`, as the package packs it.

    Args:
        groups, ignore: `config_groups` and `ignore` of its `quantization_config`.
        dtype: of scales, and of what is not quantized.
    """
    config = Gemma4TextConfig(**(GEMMA4 | WIDE | changes))
    model = Gemma4ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        tensors |= {n: b for n, b in model.named_buffers() if n.endswith("layer_scalar")}
        for tensor in tensors.values():
            centre, spread = (1.0, 0.2) if tensor.ndim == 1 else (0.0, 0.1)
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    model.to(dtype)
    fields = {"config_groups": groups, "ignore": ignore, "format": "pack-quantized"}
    apply_quantization_config(model, QuantizationConfig(**fields), show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            _set_scales(module, scheme)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    saved = {n: t.contiguous() for n, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        saved = {n: t for n, t in saved.items() if n != "lm_head.weight"}
    folder.mkdir(parents=True)
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    outer = config.to_dict() | {
        "dtype": str(dtype).removeprefix("torch."),
        "architectures": ["Gemma4ForCausalLM"],
    }
    outer["quantization_config"] = json.loads(compressor.quantization_config.model_dump_json())
    outer["quantization_config"] |= {"quantization_status": "compressed", "version": "0.20.1"}
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def _set_scales(module: torch.nn.Module, scheme: Any) -> None:
    """Scales and zero points that clip nothing, as its simplest observer finds them."""
    values = module.weight.detach().float()
    size = scheme.weights.group_size
    grouped = values.unflatten(-1, (-1, size if size and size > 0 else values.shape[-1]))
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    with torch.no_grad():
        module.weight_scale.copy_(scale)
        module.weight_zero_point.copy_(zero_point)
        for side in ("input", "output"):
            if hasattr(module, f"{side}_scale"):
                getattr(module, f"{side}_scale").fill_(0.03)
