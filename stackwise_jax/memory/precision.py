"""What numbers are stored and multiplied as."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stackwise_jax.types import Params

DTYPES: dict[str, DTypeLike] = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def to_storage(params: Params, precision: str) -> Params:
    """Casts every array of a frozen tree to its storage precision."""
    return jax.tree.map(lambda leaf: leaf.astype(DTYPES[precision]), params)


def item_bytes(precision: str) -> int:
    """Bytes of one number."""
    return jnp.dtype(DTYPES[precision]).itemsize
