"""A weight that is stored as a settled base and a trained low-rank part (LoRA; Hu et al., 2021).

    y = x W + scale * (x a) b

`ops.matmul` dispatches on it. The base may be an array, a quantised array or a `LowRank` itself: two adapters on one
weight are two of these, one inside the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A weight [D, F], or with a leading block axis [L, D, F] the weights of a stack, and a part of rank R beside it.

    The fields are typed loosely because JAX rebuilds the class around things that are not arrays.

    Attributes:
      base: what is settled; whatever `ops.matmul` can multiply by. It takes no gradient.
      a: [*L, D, R].
      b: [*L, R, F].
      scale: what the low-rank part is multiplied by; static, and one for all blocks.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


def settled(base: Any) -> Any:
    """A base as it is multiplied by: no gradient flows into it. One that has adapters itself is left as it is, since
    theirs may be trained."""
    return base if isinstance(base, LowRank) else jax.tree.map(jax.lax.stop_gradient, base)


def merged(weight: LowRank) -> Float[Array, "*L D F"]:
    """base + scale * a b, computed in float32, in the dtype of the base.

    Raises:
      TypeError: the base is no plain array.
    """
    base = merged(weight.base) if isinstance(weight.base, LowRank) else weight.base
    if not isinstance(base, jax.Array):
        raise TypeError(
            f"a base stored as {type(base).__name__} cannot take an adapter in; decode it to an array first"
        )
    product = jnp.matmul(weight.a.astype(jnp.float32), weight.b.astype(jnp.float32), precision="highest")
    return (base.astype(jnp.float32) + weight.scale * product).astype(base.dtype)
