"""Optimiser state in 16 or 8 bits, and where random bits for rounding come from.

`kept` wraps any Optax transformation: its state is widened to float32 before an update and rounded stochastically after
it, so that the update itself uses numbers that were not rounded yet. Only the moments of matrices are rounded. A mean
gradient ("mu" in Optax) is linear in 8 bits, as the momentum of Muon may be (Gupta et al., 2025); a mean square ("nu")
goes by logarithms, because it is divided by.

The random bits are a function of (seed, part, number of the stack in its list, update of the part, name of the array):
all of it is in the state or static, so a run that continues rounds as one that never stopped.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt16, UInt32

from stackwise_jax.models.weights import is_matrix
from stackwise_jax.ops import rounding
from stackwise_jax.ops.target import is_cpu
from stackwise_jax.types import Key, Params


class KeptState(NamedTuple):
    """The state of a transformation that `kept` wraps.

    Arrays keep the names and axes that they have without it, a leading block axis included.

    Attributes:
      inner: the wrapped state, its moments of matrices as bfloat16, or as codes of 8 bits.
      scales: the same tree, with the scales of the blocks where there are codes and nothing elsewhere.
      key: raw key of the random bits.
      count: updates so far.
    """

    inner: Any
    scales: Any
    key: UInt32[Array, "2"]
    count: Int[Array, ""]


def kept(
    inner: optax.GradientTransformation, precision: str, *, key: Key, leading: int
) -> optax.GradientTransformation:
    """Wraps a transformation so that its moments of matrices are stored in `precision`: fp32, bf16 or int8.

    Gradients and parameters are widened to float32 on their way in; updates are float32.

    Args:
      leading: axes before those of a matrix (1 in a stack).
    """

    def init(params: Any) -> KeptState:
        count = jnp.zeros((), jnp.int32)
        # Of zeros that it knew as such the compiler would work out for seconds what they are rounded to.
        zero = jax.lax.optimization_barrier(jnp.zeros(()))
        fresh = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), inner.init(widened(params)))
        return _store(fresh, precision, jax.random.key_data(key), count, leading)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, KeptState]:
        gradients, wide = widened(updates), None if params is None else widened(params)
        largest = None
        if precision == "int8" and not is_cpu():
            # A code needs the largest number of its block. A GPU's compiler would store all moments in float32 between
            # the two, 8 bytes a parameter; from what is stored anyway they are computed again in less time than that
            # takes. The barrier tells it that the second computation is meant.
            moved = inner.update(gradients, _read(state), wide)[1]
            state, largest = jax.lax.optimization_barrier((state, _largest(moved, leading)))
        updates, new = inner.update(gradients, _read(state), wide)
        return updates, _store(new, precision, state.key, state.count + 1, leading, largest)

    return optax.GradientTransformation(jax.jit(init), update)  # one program, where a state is drawn outside of one


def in_stream(state: Any, index: int) -> Any:
    """A fresh state with random bits of its own among those of equal parts; one that needs none is left as it is."""
    if not isinstance(state, KeptState):
        return state
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), index)
    return state._replace(key=jax.random.key_data(key))


def widened(tree: Any) -> Any:
    """Every array in float32; those that are float32 are left as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def rounded_like(moved: Params, params: Params, state: Any) -> Params:
    """Updated float32 weights in the dtypes of the stored ones, bfloat16 by stochastic rounding.

    Args:
      state: of the part, after the update.

    Raises:
      TypeError: there is something to round, and the state is none that `kept` made.
    """

    def round_leaf(path: tuple[Any, ...], wide: Array, stored: Array) -> Array:
        if stored.dtype == wide.dtype:
            return wide
        if not isinstance(state, KeptState):
            raise TypeError(f"weights in {stored.dtype} need the state of a transformation made for them")
        return rounding.to_bf16(wide, _bits(state.key, state.count, "weights/" + _name(path), wide))

    return jax.tree_util.tree_map_with_path(round_leaf, moved, params)


def _largest(state: Any, leading: int) -> list[Array | None]:
    """The largest magnitude of each block of the moments of matrices; None for every other array."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [None if _moment(path, leaf, leading) is None else rounding.largest_of_blocks(leaf) for path, leaf in paths]


def _store(
    state: Any, precision: str, key: Array, count: Array, leading: int, largest: list[Array | None] | None = None
) -> KeptState:
    """Rounds the moments of matrices in a state.

    Args:
      largest: as `_largest` gives it; None: not known yet.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    stored, scales = [], []
    for (path, leaf), known in zip(paths, largest or [None] * len(paths), strict=True):
        moment = _moment(path, leaf, leading)
        if moment is None or precision == "fp32":
            narrow, scale = leaf, None
        else:
            bits = _bits(key, count, _name(path), leaf)
            if precision == "bf16":
                narrow, scale = rounding.to_bf16(leaf, bits), None
            else:
                narrow, scale = (rounding.to_int8 if moment == "mu" else rounding.to_log8)(leaf, bits, known)
        stored.append(narrow)
        scales.append(scale)
    return KeptState(jax.tree.unflatten(structure, stored), jax.tree.unflatten(structure, scales), key, count)


def _read(state: KeptState) -> Any:
    """The wrapped state in float32. What a number is stored as says how it is read."""
    stored, structure = jax.tree.flatten(state.inner)
    scales = jax.tree.leaves(state.scales, is_leaf=lambda node: node is None)
    return jax.tree.unflatten(structure, [_read_leaf(leaf, s) for leaf, s in zip(stored, scales, strict=True)])


def _read_leaf(leaf: Array, scales: Float[Array, "..."] | None) -> Array:
    if leaf.dtype == jnp.bfloat16:
        return leaf.astype(jnp.float32)
    if scales is None:
        return leaf
    return (rounding.from_int8 if leaf.dtype == jnp.int8 else rounding.from_log8)(leaf, scales)


def _moment(path: tuple[Any, ...], leaf: Array, leading: int) -> str | None:
    """The field of an Optax state that an array lies in, where that is "mu" or "nu" and the array is of matrices."""
    if not is_matrix(path, leaf.ndim - leading):
        return None
    fields = [part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)]
    return fields[-1] if fields and fields[-1] in ("mu", "nu") else None


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _bits(key: Array, count: Array, name: str, like: Array) -> UInt16[Array, "..."]:
    own = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), count), zlib.crc32(name.encode()))
    return rounding.hashed_bits(jax.random.key_data(own), like.shape)
