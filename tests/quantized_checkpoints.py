"""Random checkpoints in the mobile format, as `transformers` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import GEMMA4
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, GemmaQuantizationConfig
from transformers.integrations import gemma_quant

# The rules of the published E2B: wide feed-forward parts and embeddings of 2 bits, tables of 4.
E2B_RULES: dict[str, dict[str, int]] = {
    r"^lm_head$": {"num_bits": 2},
    r"model\.embed_tokens$": {"num_bits": 2},
    r"model\.embed_tokens_per_layer$": {"num_bits": 4},
    r"model\.layers\.[0-2]\.mlp\.": {"num_bits": 4},
    r"model\.layers\.\d+\.mlp\.": {"num_bits": 2},
    r"per_layer_input_gate$": {"num_bits": 8},
    r"per_layer_projection$": {"num_bits": 8},
    r"self_attn\.": {"num_bits": 4},
}
PLAIN = ["per_layer_model_projection"]


def mobile_gemma4(
    folder: Path,
    *,
    rules: dict[str, dict[str, int]] = E2B_RULES,
    activations: bool = False,
    **changes: Any,
) -> Path:
    """Save a random quantized Gemma 4 with `GEMMA4` changed by `changes`.

    Args:
        activations: give inputs and outputs of matrices scales above 0.
    """
    quantization = GemmaQuantizationConfig(
        num_bits=4,
        quantize_embeddings=True,
        module_quant_configs=rules,
        modules_to_not_convert=PLAIN,
    )
    config = Gemma4TextConfig(**(GEMMA4 | {"tie_word_embeddings": False} | changes))
    model = Gemma4ForCausalLM(config)
    gemma_quant.replace_with_quant_layers(model, quantization, PLAIN)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors: dict[str, torch.Tensor] = {}
    layers, width = config.num_hidden_layers, config.hidden_size_per_layer_input
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, tensor.shape, generator=generator).to(torch.uint8)
        elif tensor.dtype == torch.int8:
            codes = torch.randint(-128, 128, tensor.shape, generator=generator)
            tensors[name] = codes.to(torch.int8)
        elif name.endswith("embed_tokens_per_layer.embedding_scale"):
            tensors[name] = 0.02 * (1 + 0.3 * noise(tensor.shape[0], layers)).abs()
        elif name.endswith("_activation_scale"):
            tensors[name] = torch.tensor(0.03 if activations else 0.0)
        elif name.endswith("_scale"):
            bits = 2 if "lm_head" in name or "embed_tokens" in name or "mlp" in name else 4
            bits = 8 if "per_layer" in name else bits
            tensors[name] = 0.2 / 2 ** (bits - 1) * (1 + 0.3 * noise(*tensor.shape)).abs()
        else:
            centre, spread = (1.0, 0.2) if tensor.ndim == 1 else (0.0, 0.1)
            tensors[name] = (centre + spread * noise(*tensor.shape)).to(torch.bfloat16)
    for layer in range(layers):
        for cache in ("k_cache_scale", "v_cache_scale"):
            tensors[f"model.layers.{layer}.self_attn.{cache}"] = torch.tensor(0.05)
    assert width
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = config.to_dict() | {"dtype": "bfloat16", "architectures": ["Gemma4ForCausalLM"]}
    fields["quantization_config"] = {"quant_method": "gemma"} | {
        name: getattr(quantization, name)
        for name in ("num_bits", "quantize_embeddings", "module_quant_configs")
    }
    fields["quantization_config"]["modules_to_not_convert"] = PLAIN
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
