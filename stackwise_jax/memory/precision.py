"""What numbers are stored and multiplied as."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.types import Params

DTYPES: dict[str, DTypeLike] = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}

Stored = dict[str, Array]
"""Activations as the cache keeps them: "values", and for fp8 the "scales" that they are multiplied by."""

_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


def to_storage(params: Params, precision: str) -> Params:
    """Casts every array of a frozen tree to its storage precision."""
    return jax.tree.map(lambda leaf: leaf.astype(DTYPES[precision]), params)


def as_master(stack: Params, precision: str) -> Params:
    """The weights of a live stack as they are trained: its matrices in `precision`, its vectors in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(DTYPES[precision]) if leaf.ndim == 3 else leaf, stack)


def item_bytes(precision: str) -> int:
    """Bytes of one number."""
    return jnp.dtype(DTYPES[precision]).itemsize


def token_bytes(precision: str, d_model: int) -> int:
    """Bytes of the cached activations of one token, its scale included."""
    return d_model * item_bytes(precision) + (4 if precision == "fp8" else 0)


def as_stored(x: Float[Array, "*B D"], precision: str) -> Stored:
    """Converts activations to what the cache keeps.

    fp8 is E4M3 (Micikevicius et al., 2022) with a float32 scale per token that maps its largest magnitude onto the
    largest number of the format: a rounding error of at most 1/16 of a number, or 2**-10 of that largest magnitude.
    """
    if precision != "fp8":
        return {"values": x.astype(DTYPES[precision])}
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scales = jnp.where(largest > 0, largest, 1.0) / _FP8_MAX
    # The quotient may round to a number beyond the largest, which in this format is no number.
    values = jnp.clip(wide / scales, -_FP8_MAX, _FP8_MAX).astype(DTYPES["fp8"])
    return {"values": values, "scales": scales}


def from_stored(stored: Stored, dtype: DTypeLike) -> Float[Array, "*B D"]:
    """The activations that `as_stored` converted, for arithmetic in `dtype`."""
    if "scales" not in stored:
        return stored["values"].astype(dtype)
    return (stored["values"].astype(jnp.float32) * stored["scales"]).astype(dtype)
