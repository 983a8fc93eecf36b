"""The one place where activations meet a weight.

Every linear map of every model goes through `matmul`, so that how a weight is stored is decided here and nowhere else.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.ops.lowrank import LowRank, settled


def matmul(x: Float[Array, "*B D"], weight: Float[Array, "D F"] | LowRank, *, dtype: DTypeLike) -> Float[Array, "*B F"]:
    """Multiplies in `dtype` (both operands are cast to it); the accelerator accumulates in float32.

    Leading axes are folded into one: with two contracted axes XLA's gradient of the weight is twice as slow on a CPU.
    A `LowRank` weight multiplies as its base and, beside it, through its rank.
    """
    if isinstance(weight, LowRank):
        beside = matmul(matmul(x, weight.a, dtype=dtype), weight.b, dtype=dtype)
        return matmul(x, settled(weight.base), dtype=dtype) + weight.scale * beside
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    return jnp.matmul(rows, weight.astype(dtype)).reshape(*x.shape[:-1], weight.shape[-1])
