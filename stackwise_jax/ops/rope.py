"""Rotary positions: a place is a rotation of queries and keys, so that their product depends on distance alone.

RoFormer (Su et al., 2021), equation 34, in the half-split order of LLaMA's public weights: coordinate i is paired with
i + H / 2, not with i + 1.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from stackwise_jax.schema import RopeScalingConfig


def rope_frequencies(d_head: int, theta: float, scaling: RopeScalingConfig | None = None) -> Float32[np.ndarray, "h"]:
    """The angle by which one place turns each of the d_head / 2 pairs: `theta ** (-2 i / H)` radians, then scaled.

    Scaling "linear" divides all by its factor (Chen et al., 2023, position interpolation). "llama3" divides those whose
    wavelength exceeds `original_positions / low_frequency_factor`, keeps those below `original_positions /
    high_frequency_factor`, and goes from one to the other linearly in `original_positions / wavelength` (LLaMA 3.1).

    Args:
      theta: base of the wavelengths, which run from 2 pi to nearly 2 pi theta tokens.

    Raises:
      ValueError: d_head is odd, or the scaling unknown.
    """
    if d_head % 2:
        raise ValueError(f"rotary positions pair the coordinates of a head: d_head={d_head} must be even")
    frequencies = theta ** (-np.arange(0, d_head, 2) / d_head)
    if scaling is None or scaling.kind == "none":
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
    else:
        raise ValueError(f"unknown rotary scaling {scaling.kind!r}")
    return frequencies.astype(np.float32)


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], frequencies: Float32[Array | np.ndarray, "h"]
) -> Float[Array, "B T N H"]:
    """Rotates pair i of each head by the angle `position * frequencies[i]`.

    Args:
      x: queries or keys; H is twice the number of frequencies.
      positions: place of each token inside its document.
      frequencies: of `rope_frequencies`, in radians.

    Returns:
      The rotated heads in x.dtype; angles and rotation are float32, because a 16-bit angle is wrong from place 256 on.
    """
    frequencies = jnp.asarray(frequencies)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return rotated.astype(x.dtype)
