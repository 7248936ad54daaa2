"""Inverse frequencies of rotary position embeddings, in NumPy.

Source: transformers `modeling_rope_utils`; Su et al. 2021, arXiv 2104.09864, section 3.4.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import CheckpointError, UnsupportedError

_KNOWN_FIELDS = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}


def inverse_frequencies(
    parameters: dict[str, Any], *, head_dim: int, where: str
) -> NDArray[np.float32]:
    """`[head_dim / 2]` radians per position.

    Args:
        parameters: one layer type's `rope_parameters`.
        where: how messages name it.
    Raises:
        UnsupportedError: a rope type that is not "default", "linear" or "proportional".
        CheckpointError: a missing or malformed field.
    """
    unknown = sorted(k for k, v in parameters.items() if k not in _KNOWN_FIELDS and v is not None)
    if unknown:
        raise UnsupportedError(f"{where}: rope field `{unknown[0]}` is not implemented")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise CheckpointError(f"{where}: `rope_theta` is {theta!r}; expected a positive number")
    angles = head_dim // 2
    if rope_type == "proportional":
        angles = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
    elif rope_type not in ("default", "linear"):
        raise UnsupportedError(
            f"{where}: rope type `{rope_type}` is not implemented; "
            "implemented: default, linear, proportional"
        )
    exponents = np.arange(0, 2 * angles, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in float64, then rounded: float32 powers differ between NumPy and torch.
    powers = (float(theta) ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.zeros(head_dim // 2, dtype=np.float32)
    frequencies[:angles] = np.float32(1.0) / powers
    if rope_type in ("linear", "proportional"):
        frequencies /= np.float32(parameters.get("factor", 1.0))
    return frequencies
