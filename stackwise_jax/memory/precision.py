"""What numbers are stored and multiplied as."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.models.weights import Weight, is_matrix
from stackwise_jax.ops import quant
from stackwise_jax.ops.fp8 import coded
from stackwise_jax.types import Params, Quantised

DTYPES: dict[str, DTypeLike] = {
    "fp32": jnp.float32,
    "bf16": jnp.bfloat16,
    "fp16": jnp.float16,
    "fp8": jnp.float8_e4m3fn,
}

Stored = dict[str, Array]
"""Activations as the cache keeps them: "values", and for fp8 the "scales" that they are multiplied by."""

_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


_encode = jax.jit(quant.encode, static_argnames="kind")


def to_storage(params: Params, precision: str) -> Params:
    """Converts a stack, with its leading block axis, to its storage precision: fp32, bf16, fp16 or a quantised format.

    bf16 is of every array. The others are of matrices; norms, biases and routers stay as they are, in float32.
    """
    if precision in ("fp32", "bf16"):
        return jax.tree.map(lambda leaf: leaf.astype(DTYPES[precision]), params)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _matrices_to_storage(leaf, precision) if is_matrix(path, leaf.ndim - 1) else leaf, params
    )


def _matrices_to_storage(leaf: Float[Array, "L *E D F"], precision: str) -> Array | Quantised:
    if precision in quant.FORMATS:
        return _encode(leaf, kind=precision)
    return leaf.astype(DTYPES[precision])


def from_storage(params: Params, dtype: DTypeLike) -> Params:
    """A stored stack as plain arrays of `dtype`, of the numbers that arithmetic in `dtype` reads from it."""
    return jax.tree.map(
        lambda leaf: _decode(leaf, dtype=dtype) if isinstance(leaf, Quantised) else jnp.asarray(leaf, dtype),
        params,
        is_leaf=lambda leaf: isinstance(leaf, Quantised),
    )


def decoded(params: Params, dtype: DTypeLike, *, in_fp8: bool = False) -> Params:
    """A stored stack with its quantised matrices decoded, to be multiplied in `dtype`; all else as it is.

    Args:
      in_fp8: the kernels of linear maps go on to E4M3 (`ops.fp8.Coded`), from the numbers that `dtype` has of them.
        What a time vector is mapped by stays: it is no map of activations.
    """

    def decode_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        plain = _decode(leaf, dtype=dtype) if isinstance(leaf, Quantised) else leaf
        names = [str(getattr(part, "key", part)) for part in path]
        if in_fp8 and names[-1] == "kernel" and "adaptive" not in names:
            return _coded(jnp.asarray(plain, dtype))
        return plain

    return jax.tree_util.tree_map_with_path(decode_leaf, params, is_leaf=lambda leaf: isinstance(leaf, Quantised))


_coded = jax.jit(coded)
_decode = jax.jit(quant.decode, static_argnames="dtype")


def weight_bytes(weight: Weight, precision: str) -> int:
    """Bytes of a weight of one block, of matrices or a vector, as `to_storage` stores it."""
    if precision in quant.FORMATS and weight.is_matrix:
        *experts, inputs, outputs = weight.shape
        return math.prod(experts) * quant.stored_bytes((inputs, outputs), precision)
    is_cast = precision == "bf16" or weight.is_matrix
    return weight.size * (item_bytes(precision) if is_cast else 4)


def as_master(stack: Params, precision: str) -> Params:
    """The weights of a live stack as they are trained: its matrices in `precision`, its vectors in float32."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(DTYPES[precision]) if is_matrix(path, leaf.ndim - 1) else leaf, stack
    )


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
