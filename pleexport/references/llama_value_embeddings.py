"""Llama with value embeddings, one token at a time; and what the Llama-like references share.

Written from the published equations, apart from the code that exports: bundles are compared with
it. Everything is float32, and no step is merged with another.

Shape suffixes: H hidden, N heads, K key heads, D head size, W = K * D, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pleexport.errors import UnsupportedError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class TextState:
    """What is kept of a text.

    Attributes:
        position: that of the next token.
        keys, values: `[K, D]` of each token so far, by layer; keys are rotated.
    """

    position: int = 0
    keys: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    values: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x divided by the root of its mean square, over the last axis. Source: arXiv 1910.07467."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def inverse_frequencies(config: Mapping[str, Any], *, head_dim: int) -> Tensor:
    """`[D / 2]` radians per position. Source: arXiv 2104.09864, section 3.4.2.

    Older configs hold `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.

    Raises:
        UnsupportedError: a rope type that is neither "default" nor "linear".
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise UnsupportedError(
            f"config.json: rope type {rope_type!r} is not implemented; implemented: default, "
            "linear",
            hint="build with `--no-verify`, which compares with nothing",
        )
    theta: float = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    factor: float = rope["factor"] if rope_type == "linear" else 1.0
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents / factor


def rotate(x_ND: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """Rotary embedding: element i of a head turns with element i + D / 2."""
    cos, sin = (position * inv_freq).cos(), (position * inv_freq).sin()
    a, b = x_ND.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(query_ND: Tensor, keys_KD: Sequence[Tensor], values_KD: Sequence[Tensor]) -> Tensor:
    """What one token finds among the given ones, `[N * D]`; zeros where none is given.

    N / K neighbouring heads share one of keys and values.
    """
    if not keys_KD:
        return torch.zeros(query_ND.numel())
    heads, head_dim = query_ND.shape
    repeats = heads // keys_KD[0].shape[0]
    keys = torch.stack(list(keys_KD)).repeat_interleave(repeats, dim=1)
    values = torch.stack(list(values_KD)).repeat_interleave(repeats, dim=1)
    scores = torch.einsum("nd,tnd->nt", query_ND, keys) * head_dim**-0.5
    return torch.einsum("nt,tnd->nd", scores.softmax(-1), values).flatten()


class Llama:
    """The parts of a Llama model, for one token.

    Args:
        tensors: by their keys in the checkpoint.
        config: of the checkpoint; absent fields have the defaults of transformers.
    Source: arXiv 2302.13971, section 2.2; names of transformers `LlamaForCausalLM`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._config = config
        self._eps: float = config.get("rms_norm_eps", 1e-6)
        heads: int = config["num_attention_heads"]
        self.num_layers: int = config["num_hidden_layers"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
        self.kv_width: int = (config.get("num_key_value_heads") or heads) * self.head_dim
        self.inv_freq = inverse_frequencies(config, head_dim=self.head_dim)

    def row(self, key: str, token_id: int) -> Tensor:
        """What a token looks up in a table."""
        return self._tensors[key][token_id].float()

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMS norm, scaled by a weight."""
        return rms_norm(x, self._eps) * self._tensors[f"model.{name}.weight"].float()

    def heads(self, layer: int, projection: str, x: Tensor) -> Tensor:
        """`[N or K, D]`: the queries, keys or values of a layer, not rotated."""
        return self._attention(layer, projection, x).reshape(-1, self.head_dim)

    def output(self, layer: int, attended: Tensor) -> Tensor:
        """`[H]`: what the attention of a layer adds."""
        return self._attention(layer, "o_proj", attended)

    def feed_forward(self, layer: int, x: Tensor) -> Tensor:
        """`[H]`: what the feed-forward of a layer adds, its norm included."""
        n = self.norm(f"layers.{layer}.post_attention_layernorm", x)
        activation = ACTIVATIONS[self._config.get("hidden_act", "silu")]
        gated = activation(self._mlp(layer, "gate_proj", n)) * self._mlp(layer, "up_proj", n)
        return self._mlp(layer, "down_proj", gated)

    def logits(self, x: Tensor) -> Tensor:
        """`[V]`."""
        tied = self._config.get("tie_word_embeddings", False)
        head = self._tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return head.float() @ self.norm("norm", x)

    def _attention(self, layer: int, name: str, x: Tensor) -> Tensor:
        bias = self._config.get("attention_bias", False)
        return self._linear(f"model.layers.{layer}.self_attn.{name}", x, bias=bias)

    def _mlp(self, layer: int, name: str, x: Tensor) -> Tensor:
        bias = self._config.get("mlp_bias", False)
        return self._linear(f"model.layers.{layer}.mlp.{name}", x, bias=bias)

    def _linear(self, name: str, x: Tensor, *, bias: bool) -> Tensor:
        y = self._tensors[f"{name}.weight"].float() @ x
        return y + self._tensors[f"{name}.bias"].float() if bias else y


class LlamaValueEmbeddingsReference:
    """A Llama in which some layers add a looked-up row to their values.

    `value_embedding_layers` lists those layers. Rows are added after `v_proj`; like all values,
    they are not rotated.
    """

    name = "step-by-step Llama with value embeddings"

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
        self._llama = Llama(tensors, config)
        self._table_layers = sorted(config.get("value_embedding_layers") or [])

    def start(self) -> TextState:
        """An empty text."""
        return TextState()

    def vectors(self, token_id: int) -> dict[str, Tensor]:
        """What a token looks up, by graph input: `[H]` and `[layers with a table, W]`."""
        values = torch.empty(len(self._table_layers), self._llama.kv_width)
        for row, i in zip(values, self._table_layers, strict=True):
            row[:] = self._llama.row(f"model.layers.{i}.self_attn.value_embeds.weight", token_id)
        embeds = self._llama.row("model.embed_tokens.weight", token_id)
        return {"inputs_embeds": embeds, "value_embeds": values}

    def step(self, vectors: Mapping[str, Tensor], state: TextState) -> tuple[Tensor, list[Tensor]]:
        """Logits `[V]` after one more token, and what each layer hands on, `[H]`."""
        llama, t = self._llama, state.position
        rows = dict(zip(self._table_layers, vectors["value_embeds"], strict=True))
        x = vectors["inputs_embeds"]
        handed_on = []
        for i in range(llama.num_layers):
            n = llama.norm(f"layers.{i}.input_layernorm", x)
            query = rotate(llama.heads(i, "q_proj", n), t, llama.inv_freq)
            key = rotate(llama.heads(i, "k_proj", n), t, llama.inv_freq)
            value = llama.heads(i, "v_proj", n)
            if i in rows:
                value = value + rows[i].reshape(value.shape)
            state.keys[i].append(key)
            state.values[i].append(value)
            x = x + llama.output(i, attend(query, state.keys[i], state.values[i]))
            x = x + llama.feed_forward(i, x)
            handed_on.append(x)
        state.position += 1
        return llama.logits(x), handed_on
