"""The one place where activations meet a weight.

Every linear map of every model goes through `matmul`, so that how a weight is stored is decided here and nowhere else.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul(x: Float[Array, "*B D"], weight: Float[Array, "D F"], *, dtype: DTypeLike) -> Float[Array, "*B F"]:
    """Multiplies in `dtype` (both operands are cast to it); the accelerator accumulates in float32.

    Leading axes are folded into one: with two contracted axes XLA's gradient of the weight is twice as slow on a CPU.
    """
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    return jnp.matmul(rows, weight.astype(dtype)).reshape(*x.shape[:-1], weight.shape[-1])
