"""Inverse frequencies of rotary position embeddings, in NumPy.

Source: transformers `modeling_rope_utils`; Su et al. 2021, arXiv 2104.09864, section 3.4.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pleexport.families.config_reader import ConfigReader

ROPE_TYPES = ("default", "linear", "proportional")


def inverse_frequencies(parameters: ConfigReader, *, head_dim: int) -> NDArray[np.float32]:
    """`[head_dim / 2]` radians per position.

    Args:
        parameters: one layer type's `rope_parameters`.
    Raises:
        UnsupportedError: a rope type or field that is not implemented.
        CheckpointError: a missing or malformed field.
    """
    name = "rope_type" if parameters.has("rope_type") or not parameters.has("type") else "type"
    rope_type = parameters.choice(name, ROPE_TYPES) if parameters.has(name) else "default"
    theta = parameters.positive("rope_theta")
    share = parameters.number("partial_rotary_factor", default=1.0)
    if not 0 < share <= 1:
        raise parameters.malformed("partial_rotary_factor", "a number above 0 and at most 1")
    if rope_type != "proportional":
        parameters.require("partial_rotary_factor", (None, 1.0))
    factor = parameters.positive("factor", default=1.0)
    parameters.get("type")
    parameters.finish()
    angles = int(share * head_dim // 2)
    exponents = np.arange(0, 2 * angles, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in float64, then rounded: float32 powers differ between NumPy and torch.
    with np.errstate(over="ignore"):  # as in the original, whose frequency is 0 then
        powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.zeros(head_dim // 2, dtype=np.float32)
    frequencies[:angles] = np.float32(1.0) / powers
    if rope_type != "default":
        frequencies /= np.float32(factor)
    return frequencies
