"""The one place where activations meet a weight.

Every linear map of every model goes through `matmul`, so that how a weight is stored is decided here and nowhere else.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.ops.fp8 import Coded, coded_matmul, fp8_gradient_of_rows, fp8_matmul
from stackwise_jax.ops.lowrank import LowRank, settled
from stackwise_jax.ops.quant import decode, multiply_row
from stackwise_jax.types import Quantised


def matmul(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D F"] | Quantised | Coded | LowRank,
    *,
    dtype: DTypeLike,
    in_fp8: bool = False,
) -> Float[Array, "*B F"]:
    """Multiplies in `dtype` (both operands are cast to it); the accelerator accumulates in float32.

    A quantised weight is decoded in front of the matmul: gradient passes through it to `x` and none to it. With
    `in_fp8` the operands, once in `dtype`, go on to fp8 (`ops/fp8.py`). A `Coded` weight is there already, and takes
    `x` with it.

    Leading axes are folded into one: with two contracted axes XLA's gradient of the weight is twice as slow on a CPU.
    A `LowRank` weight multiplies as its base and, beside it, through its rank, which is too narrow to gain from fp8.
    """
    if isinstance(weight, LowRank):
        beside = matmul(weight.scale * matmul(x, weight.a, dtype=dtype), weight.b, dtype=dtype)
        return matmul(x, settled(weight.base), dtype=dtype, in_fp8=in_fp8) + beside
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    if isinstance(weight, Coded):
        product = coded_matmul(rows, weight)
    elif isinstance(weight, Quantised):
        product = _through_quantised(rows, weight, in_fp8)
    elif in_fp8:
        product = fp8_matmul(rows, weight.astype(dtype))
    else:
        product = jnp.matmul(rows, weight.astype(dtype))
    return product.reshape(*x.shape[:-1], product.shape[-1])


def as_array(weight: Float[Array, "*E D F"] | Quantised | LowRank, *, dtype: DTypeLike) -> Float[Array, "*E D F"]:
    """The matrix that `matmul` multiplies by: decoded, and with its low-rank part added in. Also of several at once."""
    if isinstance(weight, LowRank):
        product = jnp.matmul(weight.a.astype(dtype), weight.b.astype(dtype))
        return as_array(settled(weight.base), dtype=dtype) + weight.scale * product
    return decode(weight, dtype) if isinstance(weight, Quantised) else weight.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _through_quantised(rows: Float[Array, "M D"], weight: Quantised, in_fp8: bool) -> Float[Array, "M F"]:
    """rows @ weight. The backward pass decodes again instead of keeping every decoded matrix of a stack."""
    if len(rows) == 1 and not in_fp8:  # a token that is generated: reading the weight is all that it costs
        return multiply_row(rows[0], weight).astype(rows.dtype)[None]
    decoded = decode(weight, rows.dtype)
    return fp8_matmul(rows, decoded) if in_fp8 else jnp.matmul(rows, decoded)


def _forward(rows: Float[Array, "M D"], weight: Quantised, in_fp8: bool) -> tuple[Array, Quantised]:
    return _through_quantised(rows, weight, in_fp8), weight


def _backward(in_fp8: bool, weight: Quantised, gradient: Float[Array, "M F"]) -> tuple[Array, None]:
    # The compiler would find this decoding equal to the first, and keep every decoded matrix until here.
    weight, gradient = jax.lax.optimization_barrier((weight, gradient))
    decoded = decode(weight, gradient.dtype)
    return fp8_gradient_of_rows(gradient, decoded) if in_fp8 else jnp.matmul(gradient, decoded.T), None


_through_quantised.defvjp(_forward, _backward)
