"""What a reader keeps of the places that a rack has read, by the kind of its attention.

    KeyValues    keys and values of each place and key head: dot products, and kernels inside the softmax
    Latents      one latent a place, and the rotary key that all heads share: latent attention
    KernelSums   sums over all places, however many: kernel attention in linear time

Each is of one block or, with a leading axis, of a stack.
"""

import dataclasses
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from stackwise_jax.models import weights
from stackwise_jax.schema import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys (after rotation, of kernel attention their features) and values of the places read so far."""

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K V"]

    @property
    def slots(self) -> int:
        """Places that there is room for."""
        return self.keys.shape[-3]

    def write(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K V"], at: Int[Array, ""] | int
    ) -> "KeyValues":
        """Those of one block with `T` more places from slot `at` on."""
        return KeyValues(_write(self.keys, keys, at), _write(self.values, values, at))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Of each place the normalised latent of its keys and values, then the rotated key that all heads share."""

    entries: Float[Array, "*L B S R"]

    @property
    def slots(self) -> int:
        """Places that there is room for."""
        return self.entries.shape[-2]

    def write(self, entries: Float[Array, "B T R"], at: Int[Array, ""] | int) -> "Latents":
        """Those of one block with `T` more places from slot `at` on."""
        return Latents(_write(self.entries, entries, at))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelSums:
    """Sums over the places of each row's text so far; see `ops.linear_attention`."""

    sums: Float32[Array, "*L B K M W"]

    @property
    def slots(self) -> None:
        """It is as large whatever was read."""
        return None


Store = KeyValues | Latents | KernelSums


def init_store(model: ModelConfig, n_blocks: int, batch: int, length: int, *, dtype: DTypeLike) -> Store:
    """The empty store of a stack, with room for `length` places of `batch` rows."""
    n_heads, value_width = typing.cast(int, model.n_kv_heads), weights.value_width(model)
    if model.is_linear_time:
        sums = (n_blocks, batch, n_heads, model.kernel.positive_features, value_width + 1)
        return KernelSums(jnp.zeros(sums, jnp.float32))
    places = (n_blocks, batch, length)
    if weights.stores_latents(model):
        rank = typing.cast(int, model.latent.kv_rank)
        return Latents(jnp.zeros((*places, rank + weights.rotary_key_width(model)), dtype))
    keys = jnp.zeros((*places, n_heads, weights.product_width(model)), dtype)
    return KeyValues(keys, jnp.zeros((*places, n_heads, value_width), dtype))


def slots(stored: Sequence[Store]) -> int | None:
    """Places that the stores of a rack have room for; None where they hold sums. A rack without stacks stores nothing,
    in one slot."""
    return stored[0].slots if stored else 1


def _write(stored: Array, new: Array, at: Int[Array, ""] | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), at, 1)
