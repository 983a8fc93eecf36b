"""Normalisation of the last axis, with a gradient that keeps the input as it came and two numbers a place.

Differentiated as it is written, a norm keeps float32 copies of its input for the backward pass, and LayerNorm's takes
two reductions that wait for one another. Here the backward pass makes them again, and its reductions run as one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class _Saved(NamedTuple):
    """What the backward pass reads; `mean` only where it is subtracted, `bias` only where there is one."""

    x: Float[Array, "*B D"]
    scale: Float[Array, "*b D"]
    bias: Float[Array, "*b D"] | None
    mean: Float[Array, "*B 1"] | None
    inverse: Float[Array, "*B 1"]


def normalise(
    x: Float[Array, "*B D"],
    scale: Float[Array, "*b D"],
    bias: Float[Array, "*b D"] | None,
    *,
    subtracts_mean: bool,
    epsilon: int | float,
) -> Float[Array, "*B D"]:
    """Returns RMSNorm (Zhang and Sennrich, 2019), or LayerNorm (Ba et al., 2016) where the mean is subtracted.

    Args:
      scale, bias: multiply and shift the normalised entries; no shift where the bias is None. One vector [D] for all,
        or one for each index of the first axes of x: [B D] beside [B T D] gives every row its own.
      epsilon: added to the variance.

    Returns:
      x.dtype; float32 inside.
    """
    return _normalise(x, scale, bias, subtracts_mean, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
    x: Float[Array, "*B D"],
    scale: Float[Array, "*b D"],
    bias: Float[Array, "*b D"] | None,
    subtracts_mean: bool,
    epsilon: int | float,
) -> Float[Array, "*B D"]:
    return _forward(x, scale, bias, subtracts_mean, epsilon)[0]


def _forward(
    x: Float[Array, "*B D"],
    scale: Float[Array, "*b D"],
    bias: Float[Array, "*b D"] | None,
    subtracts_mean: bool,
    epsilon: int | float,
) -> tuple[Float[Array, "*B D"], _Saved]:
    wide, mean = x.astype(jnp.float32), None
    if subtracts_mean:
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    y = wide * inverse * _as_row(scale, x)
    if bias is not None:
        y = y + _as_row(bias, x)
    return y.astype(x.dtype), _Saved(x, scale, bias, mean, inverse)


def _backward(
    subtracts_mean: bool, epsilon: int | float, saved: _Saved, cotangent: Float[Array, "*B D"]
) -> tuple[Array, Array, Array | None]:
    """With n the normalised entries and g what arrives at them: dx = (g - mean(g) - n mean(g n)) / deviation."""
    wide = saved.x.astype(jnp.float32)
    if saved.mean is not None:
        wide = wide - saved.mean
    normal, arriving = wide * saved.inverse, cotangent.astype(jnp.float32)
    g = arriving * _as_row(saved.scale, wide)
    d_x = g - normal * jnp.mean(g * normal, axis=-1, keepdims=True)
    if saved.mean is not None:
        d_x = d_x - jnp.mean(g, axis=-1, keepdims=True)
    places = tuple(range(saved.scale.ndim - 1, wide.ndim - 1))  # that share a scale and a bias
    d_scale = jnp.sum(arriving * normal, axis=places).astype(saved.scale.dtype)
    d_bias = None if saved.bias is None else jnp.sum(arriving, axis=places).astype(saved.bias.dtype)
    return (d_x * saved.inverse).astype(saved.x.dtype), d_scale, d_bias


_normalise.defvjp(_forward, _backward)


def _as_row(vector: Float[Array, "*b D"], like: Float[Array, "*B D"]) -> Float[Array, "*_ D"]:
    """In float32 and of the rank of `like`, so that broadcasting over it is explicit."""
    return jnp.expand_dims(vector.astype(jnp.float32), tuple(range(vector.ndim - 1, like.ndim - 1)))
