"""Layers that train with their rounding in the loop, and are saved in Gemma 4's mobile format.

Weights are kept in float32. Each forward pass rounds them to codes of 2, 4 or 8 bits, with one
learned scale for each output of a matrix, and for each token and layer of a table. Gradients pass
the rounding as if it were not there. Inputs and outputs of matrices are rounded to 8 bits, with
scales that follow the largest value that training meets.

Shape suffixes: B windows, T tokens, V token ids, O outputs, I inputs, G groups that share a scale.

Source: the rounding is that of transformers `integrations/gemma_quant.py`; the gradient of a scale
is that of Esser et al., "Learned step size quantization", arXiv 1902.08153.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pleexport.codes import pack_codes

# By regular expression, as the published E2B has them: wide feed-forward parts, embedding and
# head in 2 bits; other feed-forward parts, attention and the per-layer table in 4.
RULES = {
    r"^lm_head$": 2,
    r"model\.embed_tokens$": 2,
    r"model\.embed_tokens_per_layer$": 4,
    r"model\.layers\.[0-3]\.mlp\.": 4,
    r"model\.layers\.\d+\.mlp\.": 2,
    r"per_layer_input_gate$": 8,
    r"per_layer_projection$": 8,
    r"self_attn\.": 4,
}
PLAIN = "per_layer_model_projection"
QUANTIZATION: dict[str, Any] = {
    "quant_method": "gemma",
    "num_bits": 4,
    "quantize_embeddings": True,
    "module_quant_configs": {pattern: {"num_bits": bits} for pattern, bits in RULES.items()},
    "modules_to_not_convert": [PLAIN],
}
# What the trained tensors have beside numbers ends so.
SCALES = ("_log_scale", "_activation_scale", "_cache_scale")
MAX_ACTIVATION_CODE = 127
MOMENTUM = 0.99  # of activation scales
SHARES = torch.linspace(1.0, 0.2, 41)  # of the scale that clips nothing, to search the best among


def bits_of(module: str) -> int:
    """The bits of a module's codes: the first rule that matches its name."""
    return next(bits for pattern, bits in RULES.items() if re.search(pattern, module))


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_weights(values: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """Round `[..., W]` to codes times `scales` `[..., 1]`; differentiable in both.

    Values that are clipped have no gradient; a scale has that of what its codes stand for.
    """
    steps = (values / scales).clamp(*code_range(bits))
    return (steps + (steps.round() - steps).detach()) * scales


@torch.no_grad()
def search_scales(values: Tensor, *, bits: int) -> Tensor:
    """The scales `[..., 1]` with which `[..., W]` is rounded for the least squared error."""
    widest = values.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 2 ** (bits - 1)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in SHARES:
        scales = widest * share
        errors = (round_weights(values, scales, bits=bits) - values).square().sum(-1, keepdim=True)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


class RoundActivations(torch.autograd.Function):
    """Rounds to 8 bits with one scale for all; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).round_().clamp_(-MAX_ACTIVATION_CODE - 1, MAX_ACTIVATION_CODE) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@torch.no_grad()
def follow_largest(scale: Tensor, values: Tensor) -> None:
    """Move a scale, 0 at first, towards that of the largest of a batch's values."""
    lowest, highest = values.aminmax()
    target = torch.maximum(-lowest, highest) / MAX_ACTIVATION_CODE
    scale.copy_(torch.where(scale > 0, MOMENTUM * scale + (1 - MOMENTUM) * target, target))


def make_scale() -> nn.Parameter:
    """A scale that is kept with the trained tensors, but not by a gradient; 0 means none."""
    return nn.Parameter(torch.zeros(()), requires_grad=False)


class RoundedLinear(nn.Module):
    """A matrix `[O, I]` in codes, between inputs and outputs in codes.

    Args:
        weight: the numbers to start from.
        rounds_activations: whether inputs and outputs are rounded.
    """

    def __init__(self, weight: nn.Parameter, *, bits: int, rounds_activations: bool = True) -> None:
        super().__init__()
        self.bits, self.rounds_activations = bits, rounds_activations
        self.weight = weight
        self.weight_log_scale = nn.Parameter(search_scales(weight, bits=bits).log())
        self.input_activation_scale, self.output_activation_scale = make_scale(), make_scale()

    def forward(self, x_BTI: Tensor) -> Tensor:
        weight_OI = round_weights(self.weight, self.weight_log_scale.exp(), bits=self.bits)
        x_BTI = self.round(x_BTI, self.input_activation_scale)
        return self.round(functional.linear(x_BTI, weight_OI), self.output_activation_scale)

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.training and self.rounds_activations:
            follow_largest(scale, x)
        return RoundActivations.apply(x, scale) if scale > 0 else x

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by the names of `transformers`."""
        scales_O1 = self.weight_log_scale.exp()
        return {
            "weight": pack(self.weight, scales_O1, bits=self.bits),
            "weight_scale": scales_O1,
            "input_activation_scale": self.input_activation_scale,
            "output_activation_scale": self.output_activation_scale,
        }


class RoundedEmbedding(nn.Module):
    """A table `[V, W]` in codes; a row is rounded when it is looked up.

    Args:
        weight: the numbers to start from.
        groups: how many scales a row has.
        multiplier: what a row is multiplied by, behind its scales.
    """

    def __init__(self, weight: nn.Parameter, *, bits: int, groups: int, multiplier: float) -> None:
        super().__init__()
        self.bits, self.groups, self.multiplier = bits, groups, multiplier
        self.weight = weight
        scales_VG1 = search_scales(weight.unflatten(-1, (groups, -1)), bits=bits)
        self.weight_log_scale = nn.Parameter(scales_VG1.squeeze(-1).log())

    def forward(self, ids_BT: Tensor) -> Tensor:
        rows = functional.embedding(ids_BT, self.weight).unflatten(-1, (self.groups, -1))
        scales = functional.embedding(ids_BT, self.weight_log_scale).exp()[..., None]
        return round_weights(rows, scales, bits=self.bits).flatten(-2) * self.multiplier

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by the names of `transformers`."""
        scales_VG = self.weight_log_scale.exp()
        grouped = self.weight.unflatten(-1, (self.groups, -1))
        return {
            "embedding_quantized": pack(grouped, scales_VG[..., None], bits=self.bits),
            "embedding_scale": scales_VG,
        }


def pack(values: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """The codes of `[O, W]` or `[V, G, W]`, packed along all but the first axis.

    They come out of `round_weights` itself, so that they are those of the last forward pass.
    """
    codes = (round_weights(values, scales, bits=bits) / scales).round().flatten(1).to(torch.int8)
    return torch.from_numpy(pack_codes(codes.numpy(), bits=bits).copy()).view(
        torch.int8 if bits == 8 else torch.uint8
    )


def round_in_the_loop(model: nn.Module) -> None:
    """Replace matrices and tables of a Gemma 4 by rounded ones, and watch keys and values.

    As in the published checkpoints, the head has the codes of the embedding, and nothing is
    rounded around it.
    """
    groups = {"embed_tokens": 1, "embed_tokens_per_layer": model.config.num_hidden_layers}
    for name, module in list(model.named_modules()):
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding):
            rounded = RoundedEmbedding(
                module.weight,
                bits=bits_of(name),
                groups=groups[last],
                multiplier=module.scalar_embed_scale,
            )
        elif isinstance(module, nn.Linear) and last != PLAIN:
            rounds = name != "lm_head"
            rounded = RoundedLinear(module.weight, bits=bits_of(name), rounds_activations=rounds)
        else:
            continue
        model.set_submodule(name, rounded)
    model.lm_head.weight_log_scale = model.model.embed_tokens.weight_log_scale
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "k_norm"):
            watch_cache(layer.self_attn)


def watch_cache(attention: nn.Module) -> None:
    """Keep the scales with which an int8 cache holds keys and values of a layer.

    Keys are watched before they are rotated. A rotation mixes element i with i + half, so no
    position makes one larger than the length of that pair.
    """
    attention.k_cache_scale, attention.v_cache_scale = make_scale(), make_scale()

    def watch_keys(module: nn.Module, _: Any, keys: Tensor) -> None:
        if module.training:
            pairs = keys.detach().unflatten(-1, (2, -1)).norm(dim=-2)
            follow_largest(attention.k_cache_scale, pairs)

    def watch_values(module: nn.Module, _: Any, values: Tensor) -> None:
        if module.training:
            follow_largest(attention.v_cache_scale, values)

    attention.k_norm.register_forward_hook(watch_keys)
    attention.v_norm.register_forward_hook(watch_values)


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model of `round_in_the_loop` as a checkpoint in the mobile format has them.

    Layers that share keys and values repeat the cache scales of the layer that makes them.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoundedLinear | RoundedEmbedding):
            tensors |= {f"{name}.{part}": value for part, value in module.tensors().items()}
        else:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            saved = module.state_dict().keys()  # which has no buffers that are made anew
            numbers = {n: v for n, v in own if n in saved and not n.endswith(SCALES)}
            tensors |= {f"{name}.{n}": v.to(torch.bfloat16) for n, v in numbers.items()}
    owners: dict[str, nn.Module] = {}
    for index, layer in enumerate(model.model.layers):
        kind = model.config.layer_types[index]
        if hasattr(layer.self_attn, "k_cache_scale"):
            owners[kind] = layer.self_attn
        for part in ("k_cache_scale", "v_cache_scale"):
            key = f"model.layers.{index}.self_attn.{part}"
            tensors[key] = getattr(owners[kind], part)
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}
