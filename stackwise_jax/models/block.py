"""One Transformer block, and what it needs to know about its rows."""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from stackwise_jax.models.layers import FeedForward, Linear, Modulation, Norm, dropout, modulations
from stackwise_jax.ops.attention import attention
from stackwise_jax.ops.mask import Mask, within_window
from stackwise_jax.ops.rope import apply_rope, rope_frequencies
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a block needs besides activations.

    Attributes:
      positions: place of each query inside its document.
      mask: a `Mask`, or the array that says which stored keys each query sees when decoding.
      write_at: with stored keys, the slot that the first query's key goes to.
      time: what blocks are told of each row's masked fraction (`models.rack.time_vector`), where `model.time_input`.
    """

    positions: Int[Array, "B T"]
    mask: Mask | Bool[Array, "B 1 T S"]
    write_at: Int[Array, ""] | int = 0
    time: Float[Array, "B C"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys (after rotation) and values of the places read so far, of one block or, with a leading axis, of a stack."""

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K H"]

    def write(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], at: Int[Array, ""] | int
    ) -> "KeyValues":
        """Those of one block with `T` more places from slot `at` on."""
        update = jax.lax.dynamic_update_slice_in_dim
        return KeyValues(
            update(self.keys, keys.astype(self.keys.dtype), at, 1),
            update(self.values, values.astype(self.values.dtype), at, 1),
        )


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention (Vaswani et al., 2017; Ainslie et al., 2023)."""

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        self.query, self.key, self.value, self.output = (Linear(self.dtype, self.in_fp8) for _ in range(4))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        stored: KeyValues | None,
        is_local: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        B, T, _ = x.shape
        model = self.model
        rows = x.reshape(B * T, -1)  # once, so that the backward pass keeps it once
        queries = self.query(rows).reshape(B, T, model.n_heads, model.d_head)
        keys = self.key(rows).reshape(B, T, model.n_kv_heads, model.d_head)
        values = self.value(rows).reshape(B, T, model.n_kv_heads, model.d_head)
        if model.positions == "rotary":
            frequencies = _frequencies(model, is_local)
            queries = apply_rope(queries, context.positions, frequencies)
            keys = apply_rope(keys, context.positions, frequencies)
        if stored is not None:
            stored = stored.write(keys, values, context.write_at)
            keys, values = stored.keys.astype(self.dtype), stored.values.astype(self.dtype)
        mask = _within_reach(context, model, is_local, keys.shape[1])
        mixed = attention(queries, keys, values, mask, implementation=model.attention_implementation)
        return self.output(mixed.reshape(B * T, -1)).reshape(x.shape), stored


def _frequencies(model: ModelConfig, is_local: Array | None) -> Float32[Array | np.ndarray, "h"]:
    """Of rotary positions; those of a local block may have a base of their own."""
    d_head = typing.cast(int, model.d_head)
    frequencies = rope_frequencies(d_head, model.rope_theta, model.rope_scaling)
    if is_local is None or model.rope_theta_local is None:
        return frequencies
    of_local = rope_frequencies(d_head, model.rope_theta_local, model.rope_scaling)
    return jnp.where(is_local > 0, of_local, frequencies)


def _within_reach(
    context: Context, model: ModelConfig, is_local: Array | None, length: int
) -> Mask | Bool[Array, "B 1 T S"]:
    """The mask of a block, cut to the model's window unless the block is one of those that reach all `length` keys."""
    if model.window is None:
        return context.mask
    window = model.window if is_local is None else jnp.where(is_local > 0, model.window, length)
    return within_window(context.mask, window, context.write_at)


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a norm before (pre) or after the sum (post).

    With `model.stability.residual_gain` what both add is multiplied by one learned number of the block (ReZero;
    Bachlechner et al., 2021). With `model.time_input` both norms, in either position, are scaled and shifted by what
    the time vector maps to (adaptive norms; Peebles and Xie, 2023, without their gates).
    """

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        self.attention_norm, self.mlp_norm = Norm(self.model), Norm(self.model)
        self.attention = Attention(self.model, self.dtype, self.in_fp8)
        self.mlp = FeedForward(self.model, self.dtype, self.in_fp8)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        key: Key | None = None,
        stored: KeyValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        is_local = self._fact("is_local")
        attention_change, mlp_change = self._modulations(context)
        if self.model.norm_position == "pre":
            mixed, stored = self.attention(self._read(x, attention_change), context, stored, is_local)
            x = x + self._branch(mixed, attention_key)
            return x + self._branch(self.mlp(self.mlp_norm(x, mlp_change)), mlp_key), stored
        mixed, stored = self.attention(x, context, stored, is_local)
        x = self.attention_norm(x + self._branch(mixed, attention_key), attention_change)
        return self.mlp_norm(x + self._branch(self.mlp(x), mlp_key), mlp_change), stored

    def _modulations(self, context: Context) -> tuple[Modulation | None, Modulation | None]:
        """Of the two norms."""
        if not self.model.time_input:
            return None, None
        of_attention, of_mlp = modulations(self.get_variable("params", "adaptive"), context.time, 2)
        return of_attention, of_mlp

    def _fact(self, name: str) -> Float[Array, ""] | None:
        """See `weights.block_facts`; None where all blocks are alike in it."""
        fact = self.get_variable("params", name)
        return None if fact is None else jax.lax.stop_gradient(fact)

    def _read(self, x: Float[Array, "B T D"], change: Modulation | None) -> Float[Array, "B T D"]:
        """What attention reads of a pre-norm block; without a norm nothing tells it the time."""
        normed, is_first = self.attention_norm(x, change), self._fact("is_first")
        return normed if is_first is None else jnp.where(is_first > 0, x, normed)

    def _branch(self, added: Float[Array, "B T D"], key: Key | None) -> Float[Array, "B T D"]:
        """What a residual connection adds, after dropout and the block's gain."""
        added = dropout(added, self.model.dropout, key)
        if self.model.stability.residual_gain is None:
            return added
        return self.get_variable("params", "residual_gain").astype(added.dtype) * added
