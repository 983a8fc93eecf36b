"""What stands between the matmuls of a feed-forward, with a gradient that keeps their outputs and nothing else.

Differentiated as they are written, GELU and SiLU keep what tanh and the logistic function gave, arrays of the hidden
width that are cheaper to make again than to store and read.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

gelu_erf = partial(jax.nn.gelu, approximate=False)

# GELU (Hendrycks and Gimpel, 2016) as defined (erf) or by its tanh approximation; SiLU is the gate of SwiGLU (Shazeer,
# 2020).
ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu}
ACTIVATIONS |= {"geglu_erf": gelu_erf, "gelu_erf": gelu_erf}


def activate(x: Float[Array, "*B F"], up: Float[Array, "*B F"] | None, kind: str) -> Float[Array, "*B F"]:
    """Returns act(x) * up, or act(x) without `up`; `kind` is a key of `ACTIVATIONS`. All of one dtype."""
    return _activate(x, up, kind)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _activate(x: Float[Array, "*B F"], up: Float[Array, "*B F"] | None, kind: str) -> Float[Array, "*B F"]:
    y = ACTIVATIONS[kind](x)
    return y if up is None else y * up


def _forward(
    x: Float[Array, "*B F"], up: Float[Array, "*B F"] | None, kind: str
) -> tuple[Float[Array, "*B F"], tuple[Array, Array | None]]:
    return _activate(x, up, kind), (x, up)


def _backward(
    kind: str, saved: tuple[Array, Array | None], cotangent: Float[Array, "*B F"]
) -> tuple[Array, Array | None]:
    """In float32, from saved values that the compiler may not see as the forward pass's, whose work it would keep."""
    x, up = jax.lax.optimization_barrier(saved)
    arriving = cotangent.astype(jnp.float32)
    y, pull = jax.vjp(ACTIVATIONS[kind], x.astype(jnp.float32))
    if up is None:
        return pull(arriving)[0].astype(x.dtype), None
    return pull(arriving * up.astype(jnp.float32))[0].astype(x.dtype), (arriving * y).astype(up.dtype)


_activate.defvjp(_forward, _backward)
