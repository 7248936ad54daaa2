"""RWKV-7a for training: whole windows at once, parameters named as in published checkpoints.

Shape suffixes: B windows, T tokens, G chunks of M tokens, C width, H heads of size N, L layers,
F feed-forward width, W = 1024 elements of a DeepEmbed row, V vocabulary.

Source: BlinkDL/RWKV-LM, `RWKV-v7` (equations, first values); arXiv 2503.14456; arXiv 2406.06484
for the chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 16
DOUBLINGS = 4  # 2 ** 4 = CHUNK
DEEP_RANK = 32
LOG_DECAY = -0.606531
HEAD_NORM_EPS = 64e-5
L2_NORM_EPS = 1e-12


def recur(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What RWKV-7's recurrence reads, from an empty state; all `[B, T, H, N]`.

    The state is `S_t = S_(t-1) (diag(w_t) + a_t b_t^T) + v_t k_t^T`, what is read `S_t r_t`. With
    W_t the product of the decays since the start of a chunk, a~ = W_(t-1) a, b~ = b / W_t,
    k~ = k / W_t and r~ = W_t r, a chunk is the triangular system

        u_t = S a~_t + sum over s < t of u_s (b~_s a~_t) + v_s (k~_s a~_t)

    whose solution is linear in the state S ahead of the chunk: u = S p + q. So is the state after
    it, and only that is computed chunk by chunk. A decay is at least 0.545, so 1 / W < 2e4.
    """
    length = r.shape[1]
    missing = -length % CHUNK
    chunks = []
    for x_BTHN in (r, log_w, k, v, a, b):
        padded = functional.pad(x_BTHN.float(), (0, 0, 0, 0, 0, missing))
        chunks.append(padded.unflatten(1, (-1, CHUNK)).transpose(2, 3))  # [B, G, H, M, N]
    r, log_w, k, v, a, b = chunks
    log_decay = log_w.cumsum(3)
    a, r = a * (log_decay - log_w).exp(), r * log_decay.exp()
    b, k = b * (-log_decay).exp(), k * (-log_decay).exp()
    b_turned, k_turned = b.mT, k.mT

    # p and q side by side, solved by doubling.
    between = (a @ b_turned).tril(-1)
    solved = torch.cat([a, (a @ k_turned).tril(-1) @ v], -1)
    for _ in range(DOUBLINGS - 1):
        solved = solved + between @ solved
        between = between @ between
    solved = solved + between @ solved
    p, q = solved.chunk(2, -1)

    decay = log_decay[:, :, :, -1:].exp()
    factor = (p.mT @ b + torch.eye(p.shape[-1], device=p.device)) * decay
    added = (q.mT @ b + v.mT @ k) * decay
    state = torch.zeros_like(added[:, 0])
    states = []
    for factor_BHNN, added_BHNN in zip(factor.unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = state @ factor_BHNN + added_BHNN
    before = torch.stack(states, 1)

    from_earlier = (r @ b_turned).tril()
    read = (r + from_earlier @ p) @ before.mT
    read = read + from_earlier @ q + (r @ k_turned).tril() @ v
    return read.transpose(2, 3).flatten(1, 2)[:, :length]


def shift_tokens(x_BTC: Tensor) -> Tensor:
    """For each token what the one before had; zeros for the first."""
    return functional.pad(x_BTC, (0, 0, 1, -1))


def vector(values: Tensor) -> nn.Parameter:
    """A `[1, 1, C]`, as published checkpoints hold vectors."""
    return nn.Parameter(values.float().reshape(1, 1, -1).clone())


def matrix(inputs: int, outputs: int, *, gain: float) -> nn.Parameter:
    """An orthogonal `[inputs, outputs]`, or zeros for gain 0."""
    values = torch.zeros(inputs, outputs)
    if gain:
        scale = gain * max(1.0, math.sqrt(inputs / outputs))
        nn.init.orthogonal_(values, gain=scale)
    return nn.Parameter(values)


def linear(inputs: int, outputs: int, *, bound: float) -> nn.Linear:
    """A projection without bias, uniform in [-bound, bound]."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


class TimeMix(nn.Module):
    """The recurrence of one layer, with what it is made of."""

    def __init__(self, index: int, layers: int, width: int, head_size: int) -> None:
        super().__init__()
        heads, self.head_size = width // head_size, head_size
        depth, height = index / max(1, layers - 1), 1 - index / layers
        at = torch.arange(width) / width
        centred = torch.arange(width) / (width - 1) - 0.5
        within = (torch.arange(width) % head_size - (head_size - 1) / 2) / ((head_size - 1) / 2)
        zigzag = within * within.abs()
        for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            setattr(self, f"x_{name}", vector(1 - at ** (power * height)))
        spread = -6 + 6 * (centred + 0.5) ** (1 + depth**0.3)
        self.w0 = vector(spread + 0.5 + 2.5 * zigzag)
        self.a0 = vector(-0.19 + 0.3 * zigzag + 0.4 * centred)
        self.v0 = vector(0.73 - 0.4 * centred)
        for name, rank in (("w", 32), ("a", 32), ("v", 32), ("g", 64)):
            setattr(self, f"{name}1", matrix(width, rank, gain=0.0))
            setattr(self, f"{name}2", matrix(rank, width, gain=0.1))
        self.k_k = vector(0.71 - 0.1 * centred)
        self.k_a = vector(torch.full((width,), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, head_size), -0.04))
        self.receptance = linear(width, width, bound=0.5 * width**-0.5)
        self.key = linear(width, width, bound=0.05 * width**-0.5)
        self.value = linear(width, width, bound=0.5 * width**-0.5)
        self.output = linear(width, width, bound=0.0)
        self.ln_x = nn.GroupNorm(heads, width, eps=HEAD_NORM_EPS)
        nn.init.constant_(self.ln_x.weight, ((1 + index) / layers) ** 0.7)

    def forward(self, x_BTC: Tensor, first_BTC: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is added, and the layer's own values; `first_BTC` are those of layer 0."""
        back = shift_tokens(x_BTC) - x_BTC
        x = {name: x_BTC + back * getattr(self, f"x_{name}") for name in "rwkvag"}
        receptance, key, value = self.receptance(x["r"]), self.key(x["k"]), self.value(x["v"])
        decay = self.w0 + (torch.tanh(x["w"] @ self.w1) @ self.w2).float()
        rate = torch.sigmoid(self.a0 + x["a"] @ self.a1 @ self.a2)
        gate = torch.sigmoid(x["g"] @ self.g1) @ self.g2
        if first_BTC is not None:
            share = torch.sigmoid(self.v0 + x["v"] @ self.v1 @ self.v2)
            value = value + (first_BTC - value) * share
        removed = self.split_heads((key * self.k_k).float())
        removed = functional.normalize(removed, dim=-1, eps=L2_NORM_EPS)
        key = key * (1 + (rate - 1) * self.k_a)
        log_w = self.split_heads(LOG_DECAY * torch.sigmoid(decay))
        r, k, v, rate = (self.split_heads(y) for y in (receptance, key, value, rate))
        with torch.autocast(x_BTC.device.type, enabled=False):
            read = recur(r, log_w, k, v, -removed, removed * rate)
        read = self.ln_x(read.flatten(0, 1).flatten(1)).view_as(x_BTC)
        read = read + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.output(read * gate), value

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.head_size))


class ChannelMix(nn.Module):
    """The feed-forward of one layer; the token's row is a matrix inside its gate."""

    def __init__(self, index: int, layers: int, width: int, vocab: int) -> None:
        super().__init__()
        height, at = 1 - index / layers, torch.arange(width) / width
        self.x_k = vector(1 - at ** (height**4))
        self.key = linear(width, 4 * width, bound=0.5 * width**-0.5)
        self.value = linear(4 * width, width, bound=0.0)
        self.s_emb = nn.Embedding(vocab, DEEP_RANK**2)
        nn.init.normal_(self.s_emb.weight, std=DEEP_RANK**-0.5)
        self.s_emb_x = linear(width, DEEP_RANK**2, bound=0.0)
        self.s0 = vector(torch.ones(4 * width))
        self.s1 = matrix(width, DEEP_RANK, gain=1.0)
        self.s2 = matrix(DEEP_RANK, 4 * width, gain=0.0)

    def forward(self, x_BTC: Tensor, row_BTW: Tensor) -> Tensor:
        shifted = x_BTC + (shift_tokens(x_BTC) - x_BTC) * self.x_k
        inner = torch.relu(self.key(shifted)).square()
        row = row_BTW.unflatten(-1, (DEEP_RANK, DEEP_RANK))
        low = ((x_BTC @ self.s1).unsqueeze(-2) @ row).squeeze(-2)
        return self.value(inner * (low @ self.s2 + self.s0))


class Block(nn.Module):
    """One layer."""

    def __init__(self, index: int, layers: int, width: int, head_size: int, vocab: int) -> None:
        super().__init__()
        if index == 0:
            self.ln0 = nn.LayerNorm(width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(index, layers, width, head_size)
        self.ffn = ChannelMix(index, layers, width, vocab)


class Rwkv7a(nn.Module):
    """RWKV-7 with DeepEmbed.

    Block 0 has v0, v1 and v2 as published checkpoints do; nothing uses them.
    """

    def __init__(self, *, vocab: int, width: int, layers: int, head_size: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        self.blocks = nn.ModuleList(
            Block(index, layers, width, head_size, vocab) for index in range(layers)
        )
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, math.sqrt(vocab / width)))

    def look_up(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What tokens look up: `inputs_embeds` `[B, T, C]` and `deep_embeds` `[B, T, L, W]`.

        Embeddings come normalised, rows with the projected embedding added.
        """
        embeds_VC = self.blocks[0].ln0(self.emb.weight)
        rows = [
            functional.embedding(ids_BT, block.ffn.s_emb.weight + block.ffn.s_emb_x(embeds_VC))
            for block in self.blocks
        ]
        embeds_BTC = functional.embedding(ids_BT, embeds_VC)
        return {"inputs_embeds": embeds_BTC, "deep_embeds": torch.stack(rows, 2)}

    def forward(self, inputs_embeds: Tensor, deep_embeds: Tensor) -> Tensor:
        """Logits `[B, T, V]`."""
        x_BTC, first_BTC = inputs_embeds, None
        for block, row_BTW in zip(self.blocks, deep_embeds.unbind(2), strict=True):
            mixed_BTC, value_BTC = block.att(block.ln1(x_BTC), first_BTC)
            first_BTC = value_BTC if first_BTC is None else first_BTC
            x_BTC = x_BTC + mixed_BTC
            x_BTC = x_BTC + block.ffn(block.ln2(x_BTC), row_BTW)
        return self.head(self.ln_out(x_BTC))
