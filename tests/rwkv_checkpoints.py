"""Random RWKV checkpoints with DeepEmbed tables, keys and shapes as published."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["7a", "7b", "8", "8-hybrid"]
VARIANTS: tuple[Variant, ...] = ("7a", "7b", "8", "8-hybrid")


def rwkv(path: Path, variant: Variant, *, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
    """Save `rwkv_tensors` as a `.pth`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(rwkv_tensors(variant, dtype=dtype, **sizes), path)
    return path


def rwkv_tensors(
    variant: Variant,
    *,
    dtype: torch.dtype = torch.float32,
    vocab: int = 96,
    width: int = 128,
    layers: int = 3,
    head_size: int = 64,
    ffn: int | None = None,
    decay_rank: int = 24,
    rate_rank: int = 20,
    value_rank: int = 12,
    gate_rank: int = 40,
    de_rank: int = 32,
    dea_width: int = 256,
    dea_rank: int = 32,
    ln0: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every tensor is random, also those that training starts at ones or zeros, and none is idle.

    Signals keep a size of about 1, so that neither a tanh saturates nor float32 noise grows. The
    exceptions: block 0 carries v0, v1 and v2, and the hybrid carries ln0, for nothing.

    Args:
        ffn: feed-forward width; 4 * width if None.
        decay_rank, rate_rank, value_rank, gate_rank: inner sizes of w1 w2, a1 a2, v1 v2, g1 g2.
        de_rank: rows of `s_emb` have its square of elements.
        dea_width, dea_rank: width of DEA's queries and keys; inner size of its projections.
        ln0: whether there is a `blocks.0.ln0`; all but the hybrid need it.
    """
    draw = _Draw(torch.Generator().manual_seed(seed))
    ffn = 4 * width if ffn is None else ffn
    found = {
        "emb.weight": draw(vocab, width, spread=0.5),
        "head.weight": draw.linear(vocab, width, gain=2.0),
        **draw.norm("ln_out", width),
    }
    if ln0:
        found |= draw.norm("blocks.0.ln0", width)
    for i in range(layers):
        block = {
            **draw.norm("ln1", width),
            **draw.norm("ln2", width),
            **_time_mix(
                draw, width, head_size, ranks=(decay_rank, rate_rank, value_rank, gate_rank)
            ),
            "ffn.x_k": draw.vector(width, centre=0.5, spread=0.25),
            "ffn.key.weight": draw.linear(ffn, width),
            "ffn.value.weight": draw.linear(width, ffn, gain=0.6),
        }
        if variant in {"7a", "7b"}:
            block |= _matrix_tables(draw, vocab, width, ffn, de_rank)
        else:
            block["ffn.enn.weight"] = draw(vocab, width, centre=1.0, spread=0.5)
        if variant == "7b":
            block |= _attention_7b(draw, vocab, width, dea_width, dea_rank)
        elif variant == "8-hybrid":
            block |= _attention_hybrid(draw, vocab, width, dea_width, dea_rank)
        found |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def unused(variant: Variant, names: Iterable[str]) -> set[str]:
    """Those of `names` that the originals ignore."""
    idle = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
    if variant == "8-hybrid":
        idle |= {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    return idle & set(names)


class _Draw:
    """Normally distributed tensors of one random stream."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, *shape: int, centre: float = 0.0, spread: float = 1.0) -> Tensor:
        return centre + spread * torch.randn(shape, generator=self._generator)

    def vector(self, width: int, *, centre: float = 0.0, spread: float = 1.0) -> Tensor:
        """A `[1, 1, width]`."""
        return self(1, 1, width, centre=centre, spread=spread)

    def linear(self, outputs: int, inputs: int, *, gain: float = 1.0) -> Tensor:
        """A `[outputs, inputs]` that keeps the size of what it takes, times `gain`."""
        return self(outputs, inputs, spread=gain / math.sqrt(inputs))

    def transposed(self, inputs: int, outputs: int, *, gain: float = 1.0) -> Tensor:
        """The same as `[inputs, outputs]`."""
        return self(inputs, outputs, spread=gain / math.sqrt(inputs))

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        """Weight and bias of a norm."""
        return {
            f"{name}.weight": self(width, centre=1.0, spread=0.2),
            f"{name}.bias": self(width, spread=0.1),
        }


def _time_mix(
    draw: _Draw, width: int, head_size: int, *, ranks: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    found = {f"att.x_{n}": draw.vector(width, centre=0.5, spread=0.25) for n in "rwkvag"}
    # Decays from a half to nearly 1: some channels forget at once, others not in 64 tokens.
    found["att.w0"] = draw.vector(width, centre=-1.5, spread=1.5)
    found["att.a0"] = draw.vector(width, spread=0.5)
    found["att.v0"] = draw.vector(width, spread=0.5)
    for name, rank in zip("wavg", ranks, strict=True):
        found[f"att.{name}1"] = draw.transposed(width, rank)
        found[f"att.{name}2"] = draw.transposed(rank, width, gain=3.0 if name == "w" else 1.0)
    found["att.k_k"] = draw.vector(width, centre=0.7, spread=0.2)
    found["att.k_a"] = draw.vector(width, centre=1.0, spread=0.2)
    found["att.r_k"] = draw(width // head_size, head_size, spread=1 / math.sqrt(head_size))
    for name in ("receptance", "key", "value", "output"):
        found[f"att.{name}.weight"] = draw.linear(width, width)
    return found | draw.norm("att.ln_x", width)


def _matrix_tables(
    draw: _Draw, vocab: int, width: int, ffn: int, de_rank: int
) -> dict[str, Tensor]:
    row_width = de_rank**2
    return {
        "ffn.s_emb.weight": draw(vocab, row_width, spread=1 / math.sqrt(de_rank)),
        "ffn.s_emb_x.weight": draw.linear(row_width, width, gain=0.7 / math.sqrt(de_rank)),
        "ffn.s1": draw.transposed(width, de_rank),
        "ffn.s2": draw.transposed(de_rank, ffn, gain=0.5),
        "ffn.s0": draw.vector(ffn, centre=1.0, spread=0.3),
    }


def _attention_7b(
    draw: _Draw, vocab: int, width: int, dea_width: int, dea_rank: int
) -> dict[str, Tensor]:
    return {
        "qkv.qq.weight": draw.linear(dea_width, width),
        "qkv.k1": draw.transposed(width, dea_rank),
        "qkv.k2": draw.transposed(dea_rank, dea_width),
        "qkv.v1": draw.transposed(width, dea_rank),
        "qkv.v2": draw.transposed(dea_rank, width),
        "qkv.k_emb.weight": draw(vocab, dea_width),
        "qkv.k_emb_x.weight": draw.linear(dea_width, width, gain=0.7),
        "qkv.v_emb.weight": draw(vocab, width),
        "qkv.v_emb_x.weight": draw.linear(width, width, gain=0.7),
        "qkv.x_q": draw(dea_width, centre=0.5, spread=0.25),
        "qkv.x_k": draw(dea_width, centre=0.5, spread=0.25),
        "qkv.x_v": draw(width, centre=0.5, spread=0.25),
        **_attention_norms(draw, width, dea_width, divisor=1024),
    }


def _attention_hybrid(
    draw: _Draw, vocab: int, width: int, dea_width: int, dea_rank: int
) -> dict[str, Tensor]:
    return {
        "qkv.qq.weight": draw.linear(dea_width, width),
        "qkv.kk.weight": draw.linear(dea_rank, width),
        "qkv.kkup.weight": draw.linear(dea_width, dea_rank),
        "qkv.vv.weight": draw.linear(dea_rank, width),
        "qkv.vvup.weight": draw.linear(width, dea_rank),
        "qkv.ennk.weight": draw(vocab, dea_width),
        "qkv.emm.weight": draw(vocab, width),
        **_attention_norms(draw, width, dea_width, divisor=512),
    }


def _attention_norms(
    draw: _Draw, width: int, dea_width: int, *, divisor: float
) -> dict[str, Tensor]:
    found = draw.norm("qkv.lnv", width)
    # q k is about 0.75 of the divisor, where the cap bends: were the scores a straight line of
    # q k, then softmax would not show lnk.bias, nor a test a missing tanh.
    bias = math.sqrt(0.75 * divisor / dea_width)
    for name in ("lnq", "lnk"):
        found[f"qkv.{name}.weight"] = draw(dea_width, centre=1.0, spread=0.2)
        found[f"qkv.{name}.bias"] = draw(dea_width, centre=bias, spread=0.4 * bias)
    return found
