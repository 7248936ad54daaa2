"""The model shapes: every mechanism of the real families, at toy size; and how each is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embformer_model import Embformer
from quantized_model import QUANTIZATION, SCALES, checkpoint_tensors, round_in_the_loop
from rwkv_model import Rwkv7a
from safetensors.torch import load_file, save_file
from tokenizer import RWKV_VOCABULARY, SHARED_VOCABULARY, Vocabulary, save_tokenizer_config
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GemmaQuantizationConfig,
    PreTrainedModel,
)
from transformers.integrations import gemma_quant

# What tokens look up, by the names of a bundle's graph inputs.
Rows = dict[str, Tensor]

BOS_ID, EOS_ID = SHARED_VOCABULARY.start_id, SHARED_VOCABULARY.end_id
PAD_ID = SHARED_VOCABULARY.special_tokens.index("<pad>")
MAX_LENGTH = 1024

_LAYER_TYPES = [*["sliding_attention"] * 3, "full_attention"] * 2
_SHARED = {
    "num_hidden_layers": len(_LAYER_TYPES),
    "layer_types": _LAYER_TYPES,
    "num_kv_shared_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 64,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": SHARED_VOCABULARY.size,
    "final_logit_softcapping": 30.0,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "bos_token_id": BOS_ID,
}
EMBFORMER_CONFIG: dict[str, Any] = {
    "architectures": ["EmbformerForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "max_position_embeddings": MAX_LENGTH,
    "model_type": "embformer",
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_channel_shift": True,
    "use_sliding_window": False,
    "vocab_size": SHARED_VOCABULARY.size,
}


def create_gemma4(**changes: int) -> Gemma4ForCausalLM:
    """Return a randomly initialised toy Gemma 4: eight layers, the last four share K and V."""
    sizes = {
        "vocab_size": SHARED_VOCABULARY.size,
        "hidden_size": 192,
        "intermediate_size": 256,
        "use_double_wide_mlp": True,
        "global_head_dim": 64,
    }
    return Gemma4ForCausalLM(Gemma4TextConfig(**(_SHARED | sizes | changes)))


def create_gemma4_wide() -> Gemma4ForCausalLM:
    """Return one with rows as long as blocks of 256 want them; it is not shipped."""
    return create_gemma4(hidden_size=512, intermediate_size=512, head_dim=64, global_head_dim=128)


def create_gemma3n() -> Gemma3nForCausalLM:
    """Return a randomly initialised toy Gemma 3n.

    As in the real one, `vocab_size` is larger than `vocab_size_per_layer_input`: the 64 ids
    above the tokenizer's have an input embedding but no row in the per-layer table.
    """
    config = Gemma3nTextConfig(
        **_SHARED,
        vocab_size=SHARED_VOCABULARY.size + 64,
        hidden_size=128,
        intermediate_size=256,
        laurel_rank=16,
        altup_num_inputs=4,
        activation_sparsity_pattern=[0.95] * 3 + [0.0] * 5,
    )
    return Gemma3nForCausalLM(config)


@dataclass(frozen=True)
class GemmaFamily:
    """Gemma 3n or 4, as `transformers` has it, in a bf16 Hugging Face folder.

    Attributes:
        create: makes a model with the first weights of `transformers`.
        trains_in_bf16: whether products are computed in bf16 while it trains.
    """

    create: Callable[[], PreTrainedModel]
    trains_in_bf16: bool = True
    vocabulary: Vocabulary = SHARED_VOCABULARY
    saved_dtype: torch.dtype = torch.bfloat16
    per_layer_tables: tuple[str, ...] = ("embed_tokens_per_layer",)
    input_table: str = "model.embed_tokens"

    def build(self) -> PreTrainedModel:
        """Return a model with first weights that train well and a trainable `layer_scalar`.

        Attention scores are not divided by sqrt(head_dim) in these families, so the norms of the
        queries and keys start at head_dim ** -0.25 each. Gemma 3n's AltUp scale starts at zero in
        `transformers`, which keeps the per-layer rows out; here it starts at one. `layer_scalar`
        is a buffer in `transformers`; as a parameter of the same name it is saved under the same
        key.
        """
        model = self.create()
        for layer in model.model.layers:
            for name in ("q_norm", "k_norm"):
                norm = getattr(layer.self_attn, name, None)
                if norm is not None:
                    nn.init.constant_(norm.weight, norm.weight.numel() ** -0.25)
            if hasattr(layer, "altup"):
                nn.init.ones_(layer.altup.correct_output_scale)
            if hasattr(layer, "layer_scalar"):
                del layer.layer_scalar
                layer.layer_scalar = nn.Parameter(torch.ones(1))
        return model

    def look_up(self, model: PreTrainedModel, ids_BT: Tensor) -> Rows:
        """Return what tokens look up."""
        embeds = model.model.embed_tokens(ids_BT)
        rows = model.model.get_per_layer_inputs(ids_BT)
        return {"inputs_embeds": embeds, "per_layer_inputs": rows}

    def compute_logits(self, model: PreTrainedModel, rows: Rows) -> Tensor:
        """Return the logits of windows, from what their tokens look up."""
        return model(**rows, use_cache=False).logits

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained tensors as a checkpoint."""
        model = self.build()
        load_trained_state(model, state)
        tensors = {name: value.to(self.saved_dtype) for name, value in model.state_dict().items()}
        fresh = self.create().to(self.saved_dtype)
        fresh.load_state_dict(tensors)
        fresh.save_pretrained(folder)
        save_tokenizer_config(folder, max_length=MAX_LENGTH)

    def load(self, folder: Path) -> PreTrainedModel:
        """Load in the checkpoint's own dtype, then compute in fp32."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()


@dataclass(frozen=True)
class QuantizedGemmaFamily(GemmaFamily):
    """Gemma 4 in the mobile format: codes of 2, 4 and 8 bits, trained with their rounding.

    Attributes:
        start: the checkpoint of plain numbers that training starts from.
    """

    # bf16 has fewer digits than a code of 8 bits times its scale.
    trains_in_bf16: bool = False
    start: Path = Path(__file__).parent / "gemma4-kjv"

    def build(self) -> PreTrainedModel:
        """Return the trained numbers of `start`, rounded in each forward pass."""
        model = super().build()
        numbers = load_file(self.start / "model.safetensors")
        load_trained_state(model, {name: value.float() for name, value in numbers.items()})
        round_in_the_loop(model)
        return model

    def load_start(self) -> PreTrainedModel:
        """Load what training starts from, to compute in fp32."""
        return super().load(self.start)

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the codes and scales of the trained tensors as a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        model = self.build()
        load_trained_state(model, state)
        save_file(
            checkpoint_tensors(model), folder / "model.safetensors", metadata={"format": "pt"}
        )
        config = model.config
        config.architectures, config.dtype = [type(model).__name__], self.saved_dtype
        config.tie_word_embeddings = False
        config.quantization_config = QUANTIZATION
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_tokenizer_config(folder, max_length=MAX_LENGTH)

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a checkpoint into the modules of `transformers`, to compute in fp32.

        Its table of per-layer rows declares one scale a row, and the checkpoint has one a layer.
        """
        config = Gemma4TextConfig.from_pretrained(folder)
        rules = GemmaQuantizationConfig(**config.quantization_config)
        tensors = load_file(folder / "model.safetensors")
        model = Gemma4ForCausalLM(config)
        gemma_quant.replace_with_quant_layers(model, rules, rules.modules_to_not_convert)
        table = model.model.embed_tokens_per_layer
        scales = tensors["model.embed_tokens_per_layer.embedding_scale"]
        table.embedding_scale = nn.Parameter(torch.empty_like(scales))
        model.load_state_dict({n: t for n, t in tensors.items() if "_cache_scale" not in n})
        return model.eval()


class ModuleFamily:
    """What the families have in common whose modules look up apart from computing."""

    trains_in_bf16 = True

    def look_up(self, model: nn.Module, ids_BT: Tensor) -> Rows:
        """Return what tokens look up."""
        return model.look_up(ids_BT)

    def compute_logits(self, model: nn.Module, rows: Rows) -> Tensor:
        """Return the logits of windows, from what their tokens look up."""
        return model(**rows)


@dataclass(frozen=True)
class EmbformerFamily(ModuleFamily):
    """Embformer in a bf16 folder of Hugging Face layout, which `transformers` does not know."""

    vocabulary: Vocabulary = SHARED_VOCABULARY
    saved_dtype: torch.dtype = torch.bfloat16
    per_layer_tables: tuple[str, ...] = ("k_embed", "v_embed", "gate_embed")
    input_table: str = "model.embed_tokens"

    def build(self) -> Embformer:
        """Return a randomly initialised toy Embformer."""
        return Embformer(EMBFORMER_CONFIG)

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained tensors as a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.to(self.saved_dtype) for name, value in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        for name, value in (("config", EMBFORMER_CONFIG), ("generation_config", ids)):
            text = json.dumps(value, indent=2) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        save_tokenizer_config(folder, max_length=MAX_LENGTH)

    def load(self, folder: Path) -> Embformer:
        """Load a checkpoint to compute in fp32."""
        model = Embformer(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float().eval()


@dataclass(frozen=True)
class RwkvFamily(ModuleFamily):
    """RWKV-7a in one fp16 `.pth`, as published: tensors by name and nothing else."""

    vocabulary: Vocabulary = RWKV_VOCABULARY
    saved_dtype: torch.dtype = torch.float16
    per_layer_tables: tuple[str, ...] = ("s_emb",)
    input_table: str = "emb"

    def build(self) -> Rwkv7a:
        """Return a randomly initialised toy RWKV-7a: four layers, six heads."""
        return Rwkv7a(vocab=self.vocabulary.size, width=192, layers=4, head_size=32)

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained tensors as a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        model = self.build()
        load_trained_state(model, state)
        tensors = {name: value.to(self.saved_dtype) for name, value in model.state_dict().items()}
        torch.save(tensors, folder / "model.pth")

    def load(self, folder: Path) -> Rwkv7a:
        """Load a checkpoint to compute in fp32."""
        model = self.build()
        model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
        return model.eval()


Family = GemmaFamily | EmbformerFamily | RwkvFamily
FAMILIES: dict[str, Family] = {
    "gemma4": GemmaFamily(create_gemma4),
    "gemma4-qat": QuantizedGemmaFamily(create_gemma4),
    "gemma4-wide": GemmaFamily(create_gemma4_wide),
    "gemma3n": GemmaFamily(create_gemma3n),
    "rwkv7a": RwkvFamily(),
    "embformer": EmbformerFamily(),
}


def count_parameters(family: Family, state: dict[str, Tensor]) -> dict[str, int]:
    """Return how many numbers are trained, and how many of them are looked up.

    Scales of codes are not counted.
    """

    def count(*tables: str) -> int:
        return sum(
            value.numel()
            for name, value in state.items()
            if name.removesuffix(".weight").endswith(tables)
        )

    return {
        "total": sum(v.numel() for name, v in state.items() if not name.endswith(SCALES)),
        "per_layer_table": count(*family.per_layer_tables),
        "input_embedding": state[f"{family.input_table}.weight"].numel(),
    }


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the trained tensors; a tied tensor occurs once."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters()}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy tensors of `trained_state` into a model.

    Raises:
        ValueError: a trained tensor has no place in the model, or the reverse.
    """
    result = model.load_state_dict(state, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    missing = parameters.intersection(result.missing_keys)
    if result.unexpected_keys or missing:
        raise ValueError(f"state does not fit: {result.unexpected_keys} {sorted(missing)}")
