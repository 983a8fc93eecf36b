"""The one place where activations meet a weight.

Every linear map of every model goes through `matmul`, so that how a weight is stored is decided here and nowhere else.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul(x: Float[Array, "*B D"], weight: Float[Array, "D F"], *, dtype: DTypeLike) -> Float[Array, "*B F"]:
    """Multiplies in `dtype` (both operands are cast to it); the accelerator accumulates in float32."""
    return jnp.matmul(x.astype(dtype), weight.astype(dtype))
