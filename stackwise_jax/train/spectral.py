"""Keeps the largest singular value of every live matrix below a limit (Yoshida and Miyato, 2017; Miyato et al., 2018).

The matrix itself is bounded, not a quotient in the forward pass: whatever reads the stack later (a frozen trunk, a
quantised tail, a sampler) finds plain weights and needs to know nothing.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class SpectralState(NamedTuple):
    """The running estimate of each matrix's right singular vector of its largest singular value.

    Attributes:
      directions: a tree like the parameters; [L, F] or [L, E, F], of length 1.
    """

    directions: Any


def cap_spectral_norm(limit: float) -> optax.GradientTransformation:
    """An Optax transformation that changes updates so that no matrix ends with a singular value far above `limit`.

    To be the last of a chain, on stacked matrices [L, D, F] only, or [L, E, D, F] of experts. An update makes one power
    iteration from the vector that the last one left, so the estimate follows the weights and costs two products with a
    vector; it approaches the largest singular value from below. The first vectors are fixed numbers, so equal runs are
    equal.

    With a learning rate of a fraction f of its peak the matrix goes that share of its way: the norm is convex, so what
    was within the limit stays there.
    """

    def init(params: Any) -> SpectralState:
        return SpectralState(jax.tree_util.tree_map_with_path(_first_direction, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SpectralState]:
        leaves, structure = jax.tree.flatten(updates)
        matrices, directions = jax.tree.leaves(params), jax.tree.leaves(state.directions)
        pairs = [_capped(*entry, limit=limit) for entry in zip(leaves, matrices, directions, strict=True)]
        capped, directions = ([pair[i] for pair in pairs] for i in range(2))
        return jax.tree.unflatten(structure, capped), SpectralState(jax.tree.unflatten(structure, directions))

    return optax.GradientTransformation(init, update)


def _first_direction(path: tuple[Any, ...], leaf: Array) -> Float[Array, "*L F"]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    shape = (*leaf.shape[:-2], leaf.shape[-1])
    drawn = jax.random.normal(jax.random.key(zlib.crc32(name.encode())), shape, jnp.float32)
    return _unit(drawn)[0]


def _unit(vectors: Float[Array, "*L F"]) -> tuple[Float[Array, "*L F"], Float[Array, "*L"]]:
    """Vectors of length 1, and the lengths they had; of a vector of zeros, zeros."""
    lengths = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
    return vectors / jnp.maximum(lengths, 1e-30)[..., None], lengths


def _capped(
    update: Float[Array, "*L D F"], matrix: Float[Array, "*L D F"], direction: Float[Array, "*L F"], *, limit: float
) -> tuple[Float[Array, "*L D F"], Float[Array, "*L F"]]:
    """The update that ends within the limit, and the next direction."""
    moved = matrix + update
    left, _ = _unit(jnp.einsum("...DF,...F->...D", moved, direction, precision="highest"))
    found, norms = _unit(jnp.einsum("...DF,...D->...F", moved, left, precision="highest"))
    # A matrix of zeros has no direction; it keeps the one it had, for when it has grown.
    direction = jnp.where((norms > 0.0)[..., None], found, direction)
    factor = jnp.minimum(1.0, limit / jnp.maximum(norms, 1e-30))[..., None, None]
    return jnp.where(factor < 1.0, factor * moved - matrix, update), direction
