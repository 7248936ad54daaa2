"""Building blocks that families share, in torch. B = 1 sequence, T tokens, C cache slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Parameters(Mapping[str, Tensor]):
    """Weights by name, below an optional prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self.prefix) for n in self._tensors if n.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def below(self, prefix: str) -> Parameters:
        """The weights whose names begin with `prefix` and a dot."""
        found = copy.copy(self)
        found.prefix = f"{self.prefix}{prefix}."
        return found

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x @ weight.T`, plus the bias where there is one."""
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Layer norm over the last axis, with weight and bias."""
        weight, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def rms_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """RMS norm over the last axis, scaled by the weight."""
        return F.rms_norm(x, (x.shape[-1],), self[f"{name}.weight"], eps)


def activation(name: str, x: Tensor) -> Tensor:
    """One of `model.ACTIVATIONS`."""
    if name.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")
    return F.silu(x) if name == "silu" else F.relu(x)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, without a weight."""
    # Ones, because without them the exporter makes some in x's shape for every call.
    return F.rms_norm(x, (x.shape[-1],), torch.ones(x.shape[-1]), eps)


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """x with its last axis cut into axes of `sizes`; one may be -1."""
    return x.reshape(*x.shape[:-1], *sizes)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)`, or x where there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def rotary_angles(position_ids_BT: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, T, head_dim / 2]` for `rotate`."""
    angles = position_ids_BT.unsqueeze(-1).float() * inv_freq
    return angles.cos(), angles.sin()


def rotate(x_BTND: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of N heads; element i pairs with i + D/2. Source: arXiv 2104.09864.

    One operator of ONNX: written out, it is eight nodes for every projection.
    """
    rotated = torch.onnx.ops.rotary_embedding(x_BTND.flatten(2), *angles, num_heads=x_BTND.shape[2])
    return rotated.reshape(x_BTND.shape)


def update_cache(
    cache: tuple[Tensor, ...], keys_BTND: Tensor, values_BTND: Tensor, position_ids_BT: Tensor
) -> tuple[Tensor, ...]:
    """The tensors of a cache with the keys and values of T consecutive positions written.

    An int8 cache holds codes and a scale for each vector.

    Args:
        cache: see `model.Cache.buffers`.
    """
    capacity = torch.arange(cache[0].shape[2])[-1:] + 1
    first_slot_B = torch.remainder(position_ids_BT[:, 0], capacity)
    new = [keys_BTND.transpose(1, 2), values_BTND.transpose(1, 2)]
    if cache[0].dtype == torch.int8:
        scales = [x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127 for x in new]
        new = [torch.round(x / scale) for x, scale in zip(new, scales, strict=True)] + scales
    return tuple(
        write_cache(buffer, x.to(buffer.dtype), first_slot_B)
        for buffer, x in zip(cache, new, strict=True)
    )


@torch.library.custom_op("pleexport::write_cache", mutates_args=())
def write_cache(cache_BNCD: Tensor, new_BNTD: Tensor, first_slot_B: Tensor) -> Tensor:
    """The cache with T new entries from `first_slot_B` on, wrapping around at its end.

    The graph has one node for it that writes in place when input and output share a buffer.
    """
    capacity, tokens = cache_BNCD.shape[2], new_BNTD.shape[2]
    slots_BT = (first_slot_B.unsqueeze(1) + torch.arange(tokens)) % capacity
    index = slots_BT[:, None, :, None].expand_as(new_BNTD)
    return cache_BNCD.scatter(2, index, new_BNTD)


@write_cache.register_fake
def _(cache_BNCD: Tensor, new_BNTD: Tensor, first_slot_B: Tensor) -> Tensor:
    return torch.empty_like(cache_BNCD)


def held_positions(position_ids_BT: Tensor, *, capacity: int) -> Tensor:
    """`[C]` int64: the position that each slot holds after T were written, negative for none.

    Slot s of C holds the latest position p with p = s (mod C).
    """
    slots_C = torch.arange(capacity)
    last = position_ids_BT[:, -1]
    return last - torch.remainder(last - slots_C, slots_C[-1:] + 1)


def attention_bias(
    query_ids_BQ: Tensor, held_C: Tensor, *, window: int | None, repeats: int
) -> Tensor:
    """`[B, 1, Q * repeats, C]`: 0 for a visible slot, else -inf; a row for each query head.

    A query sees positions up to its own, and no further back than its window.
    """
    query_BQ1 = query_ids_BQ.unsqueeze(2)
    visible = (held_C >= 0) & (held_C <= query_BQ1)
    if window is not None:
        visible = visible & (held_C > query_BQ1 - window)
    bias = torch.where(visible, 0.0, -torch.inf)
    return bias[:, None, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)


def attend(
    q_BTND: Tensor, cache: tuple[Tensor, ...], bias: Tensor, *, cap: float | None = None
) -> Tensor:
    """`[B, T, N * D]`: softmax(q k) v with scale 1; K key heads serve N query heads.

    The query heads of a key head are rows of one product. ONNX's `Attention` multiplies head by
    head, which takes three times as long for one token and a long cache.

    Args:
        cache: keys and values in float32.
        bias: `[B, 1, T * N / K, C]`, see `attention_bias`.
        cap: see `softcap`.
    """
    keys_BKCD, values_BKCD = cache
    tokens, size, shared = q_BTND.shape[1], q_BTND.shape[3], keys_BKCD.shape[1]
    grouped = q_BTND.reshape(1, tokens, shared, -1, size)
    if shared > 1:
        grouped = grouped.transpose(1, 2)
    rows = grouped.reshape(1, shared, -1, size)
    scores = softcap(rows @ keys_BKCD.transpose(2, 3), cap)
    weights = torch.softmax(scores + bias, dim=-1)
    out = weights @ values_BKCD
    if shared > 1:
        out = out.reshape(1, shared, tokens, -1, values_BKCD.shape[3]).transpose(1, 2)
    return out.reshape(1, tokens, -1)


@torch.library.custom_op("pleexport::attend_in_blocks", mutates_args=())
def attend_in_blocks(
    query_BTND: Tensor,
    cache: Sequence[Tensor],
    query_ids_BT: Tensor,
    held_C: Tensor,
    block: int,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """`attend` for a cache of any dtype and length.

    The graph takes `block` slots at a time, so that no scores of a whole context are in memory;
    see `backends.onnx.attention`. No soft cap and no window are 0.
    """
    keys, values = (x.float() for x in cache[:2])
    if len(cache) > 2:
        keys, values = keys * cache[2], values * cache[3]
    repeats = query_BTND.shape[2] // keys.shape[1]
    bias = attention_bias(query_ids_BT, held_C, window=window or None, repeats=repeats)
    return attend(query_BTND, (keys, values), bias, cap=softcap or None).clone()


@attend_in_blocks.register_fake
def _(
    query_BTND: Tensor,
    cache: Sequence[Tensor],
    query_ids_BT: Tensor,
    held_C: Tensor,
    block: int,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    return query_BTND.new_empty(*query_BTND.shape[:2], query_BTND.shape[2] * cache[1].shape[3])


def token_shift(x_BTC: Tensor, previous_BC: Tensor) -> Tensor:
    """For each token its predecessor; `previous_BC` is that of the first."""
    return torch.cat([previous_BC.unsqueeze(1), x_BTC], dim=1)[:, : x_BTC.shape[1]]


@torch.library.custom_op("pleexport::wkv7", mutates_args=())
def wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-7: S = S (diag(exp(log_w)) + a b^T) + v k^T; y = S r.

    Args:
        r, log_w, k, v, a, b: `[1, T, heads, N]`.
        state: S before the first token, `[1, heads, N, N]`, a row for each value.
    Returns:
        y `[1, T, heads, N]`, and S after the last token.
    Source: arXiv 2503.14456. The graph takes many tokens at once; see `backends.onnx.recurrence`.
    """
    outputs = []
    for t in range(r.shape[1]):
        row = [x[:, t].unsqueeze(-2) for x in (log_w, k, b)]
        u = state @ a[:, t].unsqueeze(-1)
        state = state * row[0].exp() + u @ row[2] + v[:, t].unsqueeze(-1) @ row[1]
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), state.clone()


@wkv7.register_fake
def _(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(r), torch.empty_like(state)
