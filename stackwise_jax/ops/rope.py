"""Rotary positions: a place is a rotation of queries and keys, so that their product depends on distance alone.

RoFormer (Su et al., 2021), equation 34, in the half-split order of LLaMA's public weights: coordinate i is paired with
i + H / 2, not with i + 1.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def apply_rope(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotates pair i of each head by the angle `position * theta ** (-2 i / H)` radians.

    Args:
      x: queries or keys; H is even.
      positions: place of each token inside its document.
      theta: base of the wavelengths, which run from 2 pi to nearly 2 pi theta tokens.

    Returns:
      The rotated heads in x.dtype; angles and rotation are float32, because a 16-bit angle is wrong from place 256 on.

    Raises:
      ValueError: H is odd.
    """
    d_head = x.shape[-1]
    if d_head % 2:
        raise ValueError(f"rotary positions pair the coordinates of a head: d_head={d_head} must be even")
    frequencies = jnp.asarray(theta ** (-np.arange(0, d_head, 2) / d_head), jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return rotated.astype(x.dtype)
