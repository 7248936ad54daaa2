"""The step-by-step references against transformers, and against whole texts computed at once.

The computations of whole texts are written from the equations a second time, in float64, with
other means: rotation by complex numbers, masks in place of lists, `roll` in place of an index.

Shape suffixes: T tokens, N heads, D head size, H hidden.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import embformer, lckv, llama_value_embeddings
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.references.embformer import EmbformerReference, shift_channels
from pleexport.references.lckv import LckvReference
from pleexport.references.llama_value_embeddings import LlamaValueEmbeddingsReference

TOLERANCE = 1e-5  # of the range of the values
FAR = 1e-2
TOKENS = 24
IDS = [int(i) for i in torch.randint(100, (TOKENS,), generator=torch.Generator().manual_seed(1))]

Tensors = dict[str, Tensor]
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make small tensors ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def run(reference: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits `[T, V]` of IDS, and what each layer hands on, `[T, H]`."""
    state = reference.start()
    steps = [reference.step(reference.vectors(i), state) for i in IDS]
    outputs = zip(*(handed_on for _, handed_on in steps), strict=True)
    return torch.stack([logits for logits, _ in steps]), [torch.stack(list(o)) for o in outputs]


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the range of what is expected."""
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


def transformers_llama(
    tensors: Tensors, config: dict[str, Any], tables: Mapping[int, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """As `run`; `tables` are added to the values of their layers."""
    own = ("model_type", "architectures", "torch_dtype", "value_embedding_layers", "layer_types")
    llama = LlamaConfig(
        **{name: value for name, value in config.items() if name not in own},
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(llama).eval()
    weights = {n: t.float() for n, t in tensors.items() if "value_embeds" not in n}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    model.tie_weights()
    outputs = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _i, output: outputs.append(output[0]))
        if i in tables:
            rows = tables[i].float()[IDS]
            layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, v, rows=rows: v + rows)
    with torch.no_grad():
        logits = model(torch.tensor([IDS]), use_cache=False).logits[0]
    return logits, outputs


def rotated(x_TND: Tensor, config: dict[str, Any]) -> Tensor:
    half = x_TND.shape[-1] // 2
    scaling = config["rope_scaling"] or {"factor": 1.0}
    positions = torch.arange(len(x_TND), dtype=torch.float64) / scaling["factor"]
    speeds = config["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(positions, speeds)[:, None]
    turned = torch.complex(x_TND[..., :half], x_TND[..., half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attended(query_TND: Tensor, keys_TND: Tensor, values_TND: Tensor, mask_TT: Tensor) -> Tensor:
    """`[T, N * D]`; zeros for tokens that see nothing."""
    repeats = query_TND.shape[1] // keys_TND.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys_TND, values_TND))
    products = torch.einsum("tnd,snd->nts", query_TND, keys) / query_TND.shape[-1] ** 0.5
    weights = products.exp() * mask_TT
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("nts,snd->tnd", weights, values).flatten(1)


def causal(window: int | None = None, *, strict: bool = False) -> Tensor:
    past_TT = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return (past_TT >= int(strict)) & (past_TT < (window or TOKENS))


def embformer_at_once(
    tensors: Tensors, config: dict[str, Any], *, shift: int = 1, rotate_keys: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """As `run`; `shift` is how many heads further each channel's source is."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    heads, head_dim = config["num_attention_heads"], config["head_dim"]

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, head_dim))

    x = w["model.embed_tokens.weight"][IDS]
    outputs = []
    for i, layer_type in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}"
        keys = norm(split(w[f"{layer}.self_attn.k_embed.weight"][IDS]))
        keys = rotated(keys, config) if rotate_keys else keys
        values = split(w[f"{layer}.self_attn.v_embed.weight"][IDS])
        sliding = layer_type == "sliding_attention"
        mask = causal(config["sliding_window"] if sliding else None)
        x = x + attended(rotated(norm(split(norm(x))), config), keys, values, mask)
        gates = w[f"{layer}.ffn.gate_embed.weight"][IDS]
        mixed = (ACTIVATIONS[config["hidden_act"]](norm(x)) * gates).unflatten(-1, (heads, -1))
        if config["use_channel_shift"]:
            channels = [mixed[..., j].roll(-j * shift, dims=1) for j in range(head_dim)]
            mixed = torch.stack(channels, dim=-1)
        x = x + mixed.flatten(1)
        outputs.append(x)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm(x) @ w[f"{head}.weight"].T, outputs


def lckv_at_once(
    tensors: Tensors,
    config: dict[str, Any],
    *,
    passes: int | None = None,
    off_by_one: bool = False,
    wider: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """As `run`: pass over the text with the keys of the last pass, until they stay the same.

    Args:
        passes: stop after so many.
        off_by_one: layers below see the keys of the token before, at the first a zero.
        wider: how much windows are widened.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    empty = torch.zeros(TOKENS, config["num_key_value_heads"], head_dim, dtype=torch.float64)
    memory = dict.fromkeys(range(config["num_hidden_layers"]), (empty, empty))

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x / scale * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def one_pass() -> tuple[Tensor, list[Tensor]]:
        x = w["model.embed_tokens.weight"][IDS]
        outputs = []
        for i, part in enumerate(config["layer_types"].split("_")):
            layer, target = f"model.layers.{i}", int(part.rstrip("s"))
            n = norm(x, f"{layer}.input_layernorm")
            heads = {
                p: linear(n, f"{layer}.self_attn.{p}_proj").unflatten(-1, (-1, head_dim))
                for p in "qkv"
                if f"{layer}.self_attn.{p}_proj.weight" in w
            }
            if "k" in heads:
                memory[i] = rotated(heads["k"], config), heads["v"]
            keys, values = memory[target]
            if off_by_one and target > i:
                keys, values = (torch.cat([empty[:1], m[:-1]]) for m in (keys, values))
            window = config["sliding_window"] + wider if part.endswith("s") else None
            mask = causal(window, strict=target > i or config["force_nodiag"])
            found = attended(rotated(heads["q"], config), keys, values, mask)
            x = x + linear(found, f"{layer}.self_attn.o_proj")
            n = norm(x, f"{layer}.post_attention_layernorm")
            gate = ACTIVATIONS[config["hidden_act"]](linear(n, f"{layer}.mlp.gate_proj"))
            x = x + linear(gate * linear(n, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
            outputs.append(x)
        head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
        return norm(x, "model.norm") @ w[f"{head}.weight"].T, outputs

    # A token depends on earlier ones only, so each pass settles one more.
    logits, outputs = one_pass()
    for count in itertools.count(1):
        if count == passes:
            return logits, outputs
        before, (logits, outputs) = logits, one_pass()
        if torch.allclose(before, logits, rtol=0, atol=1e-13):
            return logits, outputs
        assert count <= TOKENS + 1
    raise AssertionError


def assert_same(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert error(got[0], expected[0]) < TOLERANCE
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert error(ours, theirs) < TOLERANCE


LLAMAS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "a head size and key heads that are not given": {
        "head_dim": None,
        "num_key_value_heads": None,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama_without_tables_is_transformers_llama(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = changes | {"value_embedding_layers": []}
    tensors, config = load(llama_value_embeddings(tmp_path, **changes))

    reference = LlamaValueEmbeddingsReference(tensors, config)

    assert reference.vectors(7)["value_embeds"].shape[0] == 0
    assert_same(run(reference), transformers_llama(tensors, config, {}))


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama_value_embeddings_are_added_to_the_values(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    tensors, config = load(llama_value_embeddings(tmp_path, **changes))
    tables = {i: tensors[f"model.layers.{i}.self_attn.value_embeds.weight"] for i in (0, 3)}

    got = run(LlamaValueEmbeddingsReference(tensors, config))

    assert_same(got, transformers_llama(tensors, config, tables))
    swapped = {0: tables[3], 3: tables[0]}
    for wrong in ({}, {0: tables[0]}, swapped):
        assert error(got[0], transformers_llama(tensors, config, wrong)[0]) > FAR


def test_llama_value_embeddings_are_ordered_by_layer(tmp_path: Path) -> None:
    tensors, config = load(llama_value_embeddings(tmp_path, value_embedding_layers=[3, 1]))

    rows = LlamaValueEmbeddingsReference(tensors, config).vectors(7)["value_embeds"]

    for row, i in zip(rows, (1, 3), strict=True):
        assert torch.equal(row, tensors[f"model.layers.{i}.self_attn.value_embeds.weight"][7])


EMBFORMERS: dict[str, dict[str, Any]] = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "no shift": {"use_channel_shift": False},
    "fewer heads than channels of one, one key head": {
        "num_attention_heads": 3,
        "head_dim": 16,
        "num_key_value_heads": 1,
    },
    "sliding upper layers": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "hidden_act": "relu",
    },
    "layer types": {
        "use_sliding_window": True,
        "sliding_window": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", EMBFORMERS.values(), ids=EMBFORMERS.keys())
def test_embformer_is_the_text_at_once(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = load(embformer(tmp_path, **changes))

    assert_same(run(EmbformerReference(tensors, config)), embformer_at_once(tensors, config))


@pytest.mark.parametrize("mistake", [{"shift": 0}, {"shift": -1}, {"rotate_keys": False}], ids=str)
def test_embformer_is_not_a_mistake(mistake: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = load(embformer(tmp_path))

    got, _ = run(EmbformerReference(tensors, config))

    assert error(got, embformer_at_once(tensors, config, **mistake)[0]) > FAR


def test_embformer_layer_types_follow_from_the_window(tmp_path: Path) -> None:
    tensors, config = load(
        embformer(tmp_path, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    )
    expected, _ = run(EmbformerReference(tensors, config))

    got, _ = run(EmbformerReference(tensors, config | {"layer_types": None}))

    assert torch.equal(got, expected)


@pytest.mark.parametrize(("heads", "head_dim"), [(6, 8), (3, 16), (1, 5), (8, 8)])
def test_shift_channels_permutes(heads: int, head_dim: int) -> None:
    channels = torch.arange(heads * head_dim)

    shifted = shift_channels(channels, heads=heads)

    assert torch.equal(shifted.sort().values, channels)


def test_shift_channels_example() -> None:
    x = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23])

    shifted = shift_channels(x, heads=3)

    assert shifted.tolist() == [0, 11, 22, 3, 10, 21, 2, 13, 20, 1, 12, 23]


def test_embformer_sliding_without_a_window_is_refused(tmp_path: Path) -> None:
    tensors, config = load(embformer(tmp_path, layer_types=["sliding_attention"] * 4))

    with pytest.raises(CheckpointError, match="has sliding layers, but `use_sliding_window`"):
        EmbformerReference(tensors, config)


def test_unknown_rope_type_is_refused(tmp_path: Path) -> None:
    tensors, config = load(embformer(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0}))

    with pytest.raises(UnsupportedError, match="'dynamic' is not implemented"):
        EmbformerReference(tensors, config)


LCKVS: dict[str, dict[str, Any]] = {
    "default": {},
    "all attend to the top": {"layer_types": "4_4_4_4_4"},
    "two groups": {"layer_types": "2_2_2_4_4"},
    "in a circle": {"layer_types": "1_2_0_4_0"},
    "cross-layer attention, below only": {"layer_types": "0_0_2_2_2"},
    "sliding": {"layer_types": "0s_3s_1s_3_4s", "sliding_window": 6},
    "no diagonal": {"force_nodiag": True, "tie_word_embeddings": True},
    "no diagonal, sliding, below": {
        "force_nodiag": True,
        "layer_types": "0_0s_4s_4_4s",
        "sliding_window": 2,
    },
    "biases, linear rope": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 500.0,
    },
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", LCKVS.values(), ids=LCKVS.keys())
def test_lckv_is_the_fixed_point(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = load(lckv(tmp_path, **changes))

    assert_same(run(LckvReference(tensors, config)), lckv_at_once(tensors, config))


@pytest.mark.parametrize("layer_types", [None, "0_1_2_3_4"])
def test_lckv_with_own_keys_is_transformers_llama(layer_types: str | None, tmp_path: Path) -> None:
    tensors, config = load(lckv(tmp_path, layer_types=layer_types))

    assert_same(run(LckvReference(tensors, config)), transformers_llama(tensors, config, {}))


@pytest.mark.parametrize("changes", [{}, LCKVS["sliding"], LCKVS["no diagonal"]])
def test_lckv_off_by_one_is_another_fixed_point(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = load(lckv(tmp_path, **changes))

    got = run(LckvReference(tensors, config, off_by_one=True))

    assert_same(got, lckv_at_once(tensors, config, off_by_one=True))
    assert error(got[0], lckv_at_once(tensors, config)[0]) > FAR


@pytest.mark.parametrize("mistake", [{"passes": 1}, {"wider": 1}], ids=str)
def test_lckv_is_not_a_mistake(mistake: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = load(lckv(tmp_path, layer_types="0s_3_3s_3_4", sliding_window=6))

    got, _ = run(LckvReference(tensors, config))

    assert error(got, lckv_at_once(tensors, config, **mistake)[0]) > FAR


def test_lckv_first_token_sees_nothing_above(tmp_path: Path) -> None:
    tensors, config = load(lckv(tmp_path, layer_types="4_4_4_4_3"))
    without = {n: t * 0 if "v_proj" in n else t for n, t in tensors.items()}

    full, _ = run(LckvReference(tensors, config | {"force_nodiag": True}))
    empty, _ = run(LckvReference(without, config | {"force_nodiag": True}))

    assert torch.equal(full[0], empty[0])
    assert not torch.equal(full[1], empty[1])
