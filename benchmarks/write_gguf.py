"""Write a Gemma 4 text checkpoint as a GGUF file for llama.cpp, tensor by tensor.

    python benchmarks/write_gguf.py build/checkpoints/gemma4-e2b build/e2b-q4_0.gguf

Needs `pip install gguf`. It reads the Hugging Face folder through pleexport. The
vocabulary is made up ("t0", "t1", ...): prompts are token ids. (A file that has none loads, but
llama.cpp's server stops at the first token that it wants to print.)

Every matrix and both embedding tables get the type of `--dtype`; norms, layer scalars and rotary
factors stay fp32. `llama-quantize` differs in two tensors of its Q4_0 files: it gives a tied
`token_embd` Q6_K, which the package `gguf` cannot write, and leaves `per_layer_model_proj` as it
was. Both stay at 4 bits here, as in a bundle whose weights are int4, which spares llama.cpp some
reading; `--embedding-dtype q8_0` is the nearest type above Q6_K. Keys and values of layers that
share a cache are dropped: the loader does not ask for them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tqdm import tqdm

from pleexport.checkpoint.checkpoint import Checkpoint

ARCH = gguf.MODEL_ARCH.GEMMA4
PREFIXES = ("model.language_model.", "model.")
TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}
PART_VALUES = 4 << 20
UNROTATED = 1e30  # a rotary frequency is divided by its factor: this one leaves the angle at zero


@dataclass(frozen=True)
class Layer:
    """What the metadata says of one layer, read from the shapes of its tensors."""

    sliding: bool
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int


class Source:
    """The text model's tensors by their published names, without the prefix."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.config = self.checkpoint.text_config
        names = self.checkpoint.entries
        self.prefix = next(p for p in PREFIXES if f"{p}embed_tokens.weight" in names)
        self.layer_types: list[str] = self.config["layer_types"]
        self.owners = len(self.layer_types) - self.config["num_kv_shared_layers"]
        if self.layer_types[self.owners - 2 : self.owners] != [
            "sliding_attention",
            "full_attention",
        ]:
            raise SystemExit(
                "error: llama.cpp shares the caches of the last two layers that own one and takes "
                f"them for a sliding and a full one; got {self.layer_types[: self.owners]}"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`."""
        return self.checkpoint.entries[self.prefix + key].shape

    def array(self, key: str) -> NDArray[Any]:
        """A view of tensor `key`."""
        return self.checkpoint.array(self.prefix + key)

    def loaded(self) -> Iterator[str]:
        """The tensors that llama.cpp loads, in the files' order."""
        dead = tuple(
            f"layers.{i}.self_attn.{name}.weight"
            for i in range(self.owners, len(self.layer_types))
            for name in ("k_proj", "v_proj", "k_norm")
        )
        names = (n for n in self.checkpoint.entries if n.startswith(self.prefix))
        return (key for n in names if (key := n.removeprefix(self.prefix)) not in dead)

    def layers(self) -> list[Layer]:
        """Every layer; one that shares a cache has the key heads of the owner."""
        result: list[Layer] = []
        kv_heads: dict[str, int] = {}
        for i, kind in enumerate(self.layer_types):
            attention = f"layers.{i}.self_attn."
            (head_dim,) = self.shape(f"{attention}q_norm.weight")
            if i < self.owners:
                kv_heads[kind] = self.shape(f"{attention}k_proj.weight")[0] // head_dim
            result.append(
                Layer(
                    sliding=kind == "sliding_attention",
                    heads=self.shape(f"{attention}q_proj.weight")[0] // head_dim,
                    kv_heads=kv_heads[kind],
                    head_dim=head_dim,
                    feed_forward=self.shape(f"layers.{i}.mlp.gate_proj.weight")[0],
                )
            )
        return result


def add_metadata(writer: gguf.GGUFWriter, source: Source) -> None:
    """Write the keys that llama.cpp's loader of this architecture reads."""
    config, layers = source.config, source.layers()
    vocab_size, hidden = source.shape("embed_tokens.weight")
    full = next(layer for layer in layers if not layer.sliding)
    sliding = next(layer for layer in layers if layer.sliding)
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_embedding_length_per_layer_input(
        source.shape("embed_tokens_per_layer.weight")[1] // len(layers)
    )
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([layer.feed_forward for layer in layers])
    writer.add_head_count([layer.heads for layer in layers])
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_shared_kv_layers(len(layers) - source.owners)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([layer.sliding for layer in layers])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(vocab_size)])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)
    writer.add_add_bos_token(False)


def rotary_factors(source: Source) -> NDArray[np.float32]:
    """Factors of the full layers' frequencies: the part that is not rotated is divided away."""
    rope = source.config["rope_parameters"]["full_attention"]
    if rope["rope_type"] != "proportional":
        raise SystemExit(f"error: rope type {rope['rope_type']!r} of full layers is not written")
    head_dim = next(layer.head_dim for layer in source.layers() if not layer.sliding)
    factors = np.full(head_dim // 2, UNROTATED, np.float32)
    factors[: int(rope["partial_rotary_factor"] * head_dim // 2)] = 1
    return factors


def fitting(qtype: Type, shape: tuple[int, ...]) -> Type:
    """The type of a tensor: fp32 for vectors, fp16 for rows that are no whole number of blocks."""
    if len(shape) == 1:
        return Type.F32
    return Type.F16 if shape[1] % gguf.GGML_QUANT_SIZES[qtype][0] else qtype


def quantized(array: NDArray[Any], qtype: Type, *, name: str) -> NDArray[Any]:
    """A tensor in the bytes that GGUF stores, converted a few million values at a time."""
    if array.ndim == 1:
        return array.astype(np.float32)
    rows, width = array.shape
    is_plain = qtype in (Type.F32, Type.F16)
    out = np.empty(
        (rows, width if is_plain else gguf.quant_shape_to_byte_shape((width,), qtype)[0]),
        {Type.F32: np.float32, Type.F16: np.float16}.get(qtype, np.uint8),
    )
    step = max(1, PART_VALUES // width)
    parts = range(0, rows, step)
    for begin in tqdm(parts, desc=name, leave=False, disable=len(parts) < 8):
        part = array[begin : begin + step].astype(np.float32)
        out[begin : begin + step] = gguf.quants.quantize(part, qtype)
    return out


def write_gguf(source: Source, out: Path, *, types: dict[str, Type], default: Type) -> None:
    """Write the file; `types` holds the types of tensors that do not get `default`."""
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[ARCH])
    writer.add_file_type(FILE_TYPES[default])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, source)
    names = gguf.get_tensor_name_map(ARCH, len(source.layer_types))
    chosen: list[tuple[str, str, Type]] = []
    for key in source.loaded():
        name = names.get_name(f"model.{key}", try_suffixes=(".weight",))
        if name is None:
            raise SystemExit(f"error: tensor `{key}` has no name in GGUF's {writer.arch}")
        name = name.removesuffix(".weight") + ".weight"
        shape = source.shape(key)
        qtype = fitting(types.get(key, default), shape)
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, qtype))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=qtype)
        chosen.append((key, name, qtype))
    factors = rotary_factors(source)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, name, qtype in tqdm(chosen, desc=out.name, unit="tensor"):
        writer.write_tensor_data(quantized(source.array(key), qtype, name=name))
    writer.write_tensor_data(factors)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=TYPES, default="q4_0", help="of all matrices")
    parser.add_argument("--embedding-dtype", choices=TYPES, help="of token_embd, the tied head")
    parser.add_argument("--table-dtype", choices=TYPES, help="of per_layer_token_embd")
    arguments = parser.parse_args()
    types = {
        key: TYPES[dtype]
        for key, dtype in (
            ("embed_tokens.weight", arguments.embedding_dtype),
            ("embed_tokens_per_layer.weight", arguments.table_dtype),
        )
        if dtype
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(
        Source(arguments.checkpoint), arguments.out, types=types, default=TYPES[arguments.dtype]
    )


if __name__ == "__main__":
    main()
