"""Building blocks that families share, in torch. B = 1 sequence, T tokens, C cache slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pleexport import operators
from pleexport.errors import FamilyError


class Parameters(Mapping[str, Tensor]):
    """Weights by name, below an optional prefix.

    Raises:
        FamilyError: (when asked for one) the family did not declare it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise FamilyError(
                f"a forward function takes the weight `{self.prefix}{name}`, which its family does "
                "not declare",
                hint="add it to the family's weights, or do not use it",
            )
        return self._tensors[self.prefix + name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.prefix + name in self._tensors

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
        """`x @ weight.T`, plus the bias where there is one; rounded where there are scales."""
        weight, bias = self[f"{name}.weight"], self.optional(f"{name}.bias")
        steps = [self.optional(f"{name}.{put}_activation_scale") for put in ("input", "output")]
        if steps == [None, None]:
            return F.linear(x, weight, bias)
        outputs: Tensor = operators.linear_in_steps(x, weight, bias, *steps)
        return outputs

    def optional(self, name: str) -> Tensor | None:
        """A weight that a model may lack."""
        # `get` asks for a KeyError, which a weight that is missing is not.
        return self[name] if name in self else None  # noqa: SIM401

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


def update_cache(
    cache: tuple[Tensor, ...],
    keys_BTKD: Tensor,
    values_BTKD: Tensor,
    slots_BT: Tensor,
    steps: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, ...]:
    """The tensors of a cache with the keys and values of T consecutive positions written.

    An int8 cache holds codes and a scale for each vector.

    Args:
        cache: see `model.Cache.buffers`.
        slots_BT: see `slots`.
        steps: scalars, the scale of all keys and that of all values in an int8 cache; None to
            choose one for each vector, so that its largest number is 127.
    """
    new = [keys_BTKD, values_BTKD]
    if cache[0].dtype == torch.int8:
        codes, scales = zip(*map(_in_8_bits, new, steps), strict=True)
        new = [*codes, *scales]
    return tuple(
        operators.write_cache(buffer, x.to(buffer.dtype), slots_BT)
        for buffer, x in zip(cache, new, strict=True)
    )


def _in_8_bits(x_BTKD: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes, and the scale of each vector `[B, T, K, 1]`."""
    if step is None:
        scale = x_BTKD.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return torch.round(x_BTKD / scale), scale
    codes = torch.clamp(torch.round(x_BTKD / step), -128.0, 127.0)
    return codes, step.expand(*x_BTKD.shape[:-1], 1)


def slots(position_ids_BT: Tensor, *, capacity: int) -> Tensor:
    """`[B, T]` int64: where positions lie in a cache of so many slots."""
    # As a tensor: a symbolic size cannot be a divisor in the exporter's remainder.
    capacity_1 = torch.arange(capacity)[-1:] + 1
    return torch.remainder(position_ids_BT, capacity_1)


def held_positions(position_ids_BT: Tensor, *, capacity: int) -> Tensor:
    """`[C]` int64: the position that each slot holds after T were written, negative for none.

    Slot s of C holds the latest position p with p = s (mod C).
    """
    slots_C = torch.arange(capacity)
    last = position_ids_BT[:, -1]
    return last - torch.remainder(last - slots_C, slots_C[-1:] + 1)


def token_shift(x_BTC: Tensor, previous_BC: Tensor) -> Tensor:
    """For each token its predecessor; `previous_BC` is that of the first."""
    return torch.cat([previous_BC.unsqueeze(1), x_BTC], dim=1)[:, : x_BTC.shape[1]]
