"""Matmuls in fp8 (Micikevicius et al., 2022): E4M3 forward, E5M2 for the gradient that comes back.

Every operand gets one scale, from its own largest magnitude at every call, and products are summed in float32. On a
device without fp8 units the same numbers are multiplied in wider ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from stackwise_jax.ops.target import is_cpu

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

_Residuals = tuple[Array, Array, Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """Matrices in E4M3 with one scale each, as matrix units read them: once coded, every multiplication is that alone.

    Attributes:
      codes: transposed, so that the contracted axis D is the last.
      scale: of each matrix.
    """

    codes: Float[Array, "*L F D"]
    scale: Float[Array, "*L"]


def coded(weight: Float[Array, "L D F"]) -> Coded:
    """Matrices as `fp8_matmul` codes them at every call."""
    codes, scale = jax.vmap(lambda matrix: to_fp8(matrix, E4M3))(weight)
    return Coded(jnp.swapaxes(codes, -1, -2), scale)


def coded_matmul(rows: Float[Array, "M D"], weight: Coded) -> Float[Array, "M F"]:
    """What `fp8_matmul` gives for the same weight; for passes that no gradient goes through."""
    codes, scale = to_fp8(rows, E4M3)
    return _product(codes, weight.codes, (1, 1), scale * weight.scale, rows.dtype)


def to_fp8(x: Float[Array, "*n"], dtype: DTypeLike) -> tuple[Float[Array, "*n"], Float[Array, ""]]:
    """Returns (codes, scale) with x about codes * scale; the largest magnitude of x becomes that of the format."""
    largest_code = float(jnp.finfo(dtype).max)
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    scale = jnp.where(largest == 0, 1.0, largest) / largest_code  # what is no number stays none
    return jnp.clip(wide / scale, -largest_code, largest_code).astype(dtype), scale


@jax.custom_vjp
def fp8_matmul(rows: Float[Array, "M D"], weight: Float[Array, "D F"]) -> Float[Array, "M F"]:
    """rows @ weight with both operands in E4M3; its gradients multiply these by the incoming one in E5M2.

    Args:
      rows, weight: of one dtype, which the product and both gradients are rounded to.
    """
    return _forward(rows, weight)[0]


def _forward(rows: Float[Array, "M D"], weight: Float[Array, "D F"]) -> tuple[Array, _Residuals]:
    """Keeps the operands in fp8 for the backward pass, as plain bytes.

    `jax.checkpoint` reduces the precision of the floating-point arrays that it keeps to that of their own dtype, and by
    IEEE 754, to which E4M3 does not keep, its numbers above 240 would become infinite.
    """
    codes, scale = to_fp8(rows, E4M3)
    weight_codes, weight_scale = to_fp8(weight, E4M3)
    product = _product(codes, weight_codes, (1, 0), scale * weight_scale, rows.dtype)
    return product, (_bytes(codes), scale, _bytes(weight_codes), weight_scale)


def _backward(kept: _Residuals, gradient: Float[Array, "M F"]) -> tuple[Array, Array]:
    code_bytes, scale, weight_bytes, weight_scale = kept
    codes, weight_codes = (jax.lax.bitcast_convert_type(kept_bytes, E4M3) for kept_bytes in (code_bytes, weight_bytes))
    gradient_codes, gradient_scale = to_fp8(gradient, E5M2)
    of_rows = _product(gradient_codes, weight_codes, (1, 1), gradient_scale * weight_scale, gradient.dtype)
    of_weight = _product(codes, gradient_codes, (0, 0), scale * gradient_scale, gradient.dtype)
    return of_rows, of_weight


def fp8_gradient_of_rows(gradient: Float[Array, "M F"], weight: Float[Array, "D F"]) -> Float[Array, "M D"]:
    """What `fp8_matmul` passes back to its rows, where no gradient of the weight is wanted."""
    gradient_codes, gradient_scale = to_fp8(gradient, E5M2)
    weight_codes, weight_scale = to_fp8(weight, E4M3)
    return _product(gradient_codes, weight_codes, (1, 1), gradient_scale * weight_scale, gradient.dtype)


def _bytes(codes: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    return jax.lax.bitcast_convert_type(codes, jnp.uint8)


def _product(
    left: Float[Array, "a b"],
    right: Float[Array, "c d"],
    axes: tuple[int, int],
    scale: Float[Array, ""],
    dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """Contracts one axis of each, summing in float32, then applies both scales at once; the result is in `dtype`.

    The sums of codes reach 448 * 448 times the axis, which bfloat16 holds: it leaves the matrix units in that dtype,
    in half the bytes, and is scaled by what reads it. For the narrow range of float16 it stays float32 until scaled,
    and on a CPU, which would sum in bfloat16.
    """
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    is_narrow = dtype == jnp.bfloat16 and not is_cpu()
    accumulated = jnp.bfloat16 if is_narrow else jnp.float32
    product = jax.lax.dot_general(left, right, dimensions, preferred_element_type=accumulated)
    return (product.astype(jnp.float32) * scale).astype(dtype)


fp8_matmul.defvjp(_forward, _backward)
