"""Attention through latents: as DeepSeek-V2 publishes it, and as plain low-rank maps.

Multi-head latent attention (DeepSeek-AI, 2024, section 2.1 and appendix C; unchanged in V3): keys and values of all
heads are linear maps of one narrow, normalised latent a place, so that a reader stores the latent alone. Rotation would
stand between latent and key, so positions go into further coordinates: of each query head its own, of the keys one
rotated vector that all heads share.
"""

import math
import typing

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.models import weights
from stackwise_jax.models.layers import Linear
from stackwise_jax.models.mixing import Context, mix, rotated, within_reach
from stackwise_jax.models.stores import Latents, Store
from stackwise_jax.ops.attention import attention
from stackwise_jax.ops.norm import normalise
from stackwise_jax.schema import ModelConfig


class LatentNorm(nn.Module):
    """RMSNorm of a latent, whatever the norm of the blocks."""

    model: ModelConfig

    def __call__(self, x: Float[Array, "*B R"]) -> Float[Array, "*B R"]:
        scale = self.get_variable("params", "scale")
        return normalise(x, scale, None, subtracts_mean=False, epsilon=self.model.norm_epsilon)


class LatentAttention(nn.Module):
    """`latent.form="shared"`: keys and values from one latent, positions in coordinates of their own.

    Rows that attend to themselves are read with keys and values of each head, as is a long text into the store. Few new
    places are read by absorbed maps: with W the keys' map, q (W c) = (W' q) c, so queries meet the latents themselves.
    """

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        model = self.model
        names = ["query", "latent", "key", "value", "output"]
        names += ["query_latent"] if model.latent.query_rank is not None else []
        names += ["rotary_key"] if weights.rotary_key_width(model) else []
        for name in names:
            setattr(self, name, Linear(self.dtype, self.in_fp8))
        self.latent_norm = LatentNorm(model)
        if model.latent.query_rank is not None:
            self.query_norm = LatentNorm(model)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        stored: Store | None,
        is_local: weights.Fact | None = None,
    ) -> tuple[Float[Array, "B T D"], Store | None]:
        B, T, _ = x.shape
        model, rank = self.model, typing.cast(int, self.model.latent.kv_rank)
        rows = x.reshape(B * T, -1)  # once, so that the backward pass keeps it once
        queries = self._queries(rows, context, is_local)
        entries = self.latent_norm(self.latent(rows)).reshape(B, T, rank)
        if weights.rotary_key_width(model):
            turned = rotated(self.rotary_key(rows).reshape(B, T, 1, -1), context, model, is_local)
            entries = jnp.concatenate([entries, turned[:, :, 0]], axis=-1)
        if weights.stores_latents(model) and stored is not None:
            stored = typing.cast(Latents, stored).write(entries, context.write_at)
            mixed = self._read(queries, stored.entries.astype(self.dtype), context, is_local)
        else:
            keys, values = self._heads(entries)
            mixed, stored = mix(queries, keys, values, context, stored, model, dtype=self.dtype, is_local=is_local)
        return self.output(mixed.reshape(B * T, -1)).reshape(x.shape), stored

    def _queries(
        self, rows: Float[Array, "M D"], context: Context, is_local: weights.Fact | None
    ) -> Float[Array, "B T N H"]:
        """Each head's own coordinates, then those that meet the rotary key."""
        model, (B, T) = self.model, context.positions.shape
        if model.latent.query_rank is not None:
            rows = self.query_norm(self.query_latent(rows))
        queries = self.query(rows).reshape(B, T, model.n_heads, weights.key_width(model))
        if not weights.rotary_key_width(model):
            return queries
        own, turned = jnp.split(queries, [typing.cast(int, model.d_head)], axis=-1)
        return jnp.concatenate([own, rotated(turned, context, model, is_local)], axis=-1)

    def _heads(self, entries: Float[Array, "B S R"]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
        """Keys and values of every head."""
        B, S, _ = entries.shape
        n_heads = typing.cast(int, self.model.n_kv_heads)
        latents, turned = jnp.split(entries, [typing.cast(int, self.model.latent.kv_rank)], axis=-1)
        rows = latents.reshape(B * S, -1)
        keys, values = (linear(rows).reshape(B, S, n_heads, -1) for linear in (self.key, self.value))
        shared = jnp.broadcast_to(turned[:, :, None], (B, S, n_heads, turned.shape[-1]))
        return jnp.concatenate([keys, shared], axis=-1), values

    def _read(
        self,
        queries: Float[Array, "B T N H"],
        entries: Float[Array, "B S R"],
        context: Context,
        is_local: weights.Fact | None,
    ) -> Float[Array, "B T N V"]:
        """New places against the stored ones, in the cheaper of two equal ways."""
        model, T = self.model, queries.shape[1]
        mask = within_reach(context, model, is_local, entries.shape[1])
        implementation = model.attention_implementation
        scale = 1.0 / math.sqrt(weights.key_width(model))
        rank = typing.cast(int, model.latent.kv_rank)
        widths = typing.cast(int, model.d_head) + weights.value_width(model)
        # Of each stored place and head: keys and values made once, or T products with a latent instead of with these.
        if T * (2 * rank - widths) > rank * widths:
            keys, values = self._heads(entries)
            return attention(queries, keys, values, mask, implementation=implementation, scale=scale)
        met = entries[:, :, None]  # keys and values at once: what is mixed of the rotary keys is cut off
        mixed = attention(self._absorb_keys(queries), met, met, mask, implementation=implementation, scale=scale)
        return self._absorb_values(mixed[..., :rank])

    def _absorb_keys(self, queries: Float[Array, "B T N H"]) -> Float[Array, "B T N R"]:
        """Queries that meet latents; a bias of keys adds one number to all logits of a query, and no weight changes."""
        B, T, N, _ = queries.shape
        K, d_head = typing.cast(int, self.model.n_kv_heads), typing.cast(int, self.model.d_head)
        own, turned = jnp.split(queries, [d_head], axis=-1)
        kernel = self.key.array().reshape(-1, K, d_head)
        absorbed = jnp.einsum("BTKGH,RKH->BTKGR", own.reshape(B, T, K, N // K, d_head), kernel)
        return jnp.concatenate([absorbed.reshape(B, T, N, -1), turned], axis=-1)

    def _absorb_values(self, mixed: Float[Array, "B T N R"]) -> Float[Array, "B T N V"]:
        """Values of mixed latents; the weights of a query sum to 1, so that a bias is added once."""
        B, T, N, R = mixed.shape
        K = typing.cast(int, self.model.n_kv_heads)
        kernel, bias = self.value.array().reshape(R, K, -1), self.value.bias()
        values = jnp.einsum("BTKGR,RKV->BTKGV", mixed.reshape(B, T, K, N // K, R), kernel)
        if bias is not None:
            values = values + bias.reshape(1, 1, K, 1, -1)
        return values.reshape(B, T, N, -1)


class LowRankAttention(nn.Module):
    """`latent.form="separate"`: queries, keys and values each through a latent of its own, with no norm between.

    Whole keys are rotated, and a reader stores keys and values as it does without latents.
    """

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        names = ["query", "key_latent", "key", "value_latent", "value", "output"]
        names += ["query_latent"] if self.model.latent.query_rank is not None else []
        for name in names:
            setattr(self, name, Linear(self.dtype, self.in_fp8))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        stored: Store | None,
        is_local: weights.Fact | None = None,
    ) -> tuple[Float[Array, "B T D"], Store | None]:
        B, T, _ = x.shape
        model, n_heads = self.model, typing.cast(int, self.model.n_kv_heads)
        rows = x.reshape(B * T, -1)
        of_queries = rows if model.latent.query_rank is None else self.query_latent(rows)
        queries = rotated(self.query(of_queries).reshape(B, T, model.n_heads, -1), context, model, is_local)
        keys = rotated(self.key(self.key_latent(rows)).reshape(B, T, n_heads, -1), context, model, is_local)
        values = self.value(self.value_latent(rows)).reshape(B, T, n_heads, -1)
        mixed, stored = mix(queries, keys, values, context, stored, model, dtype=self.dtype, is_local=is_local)
        return self.output(mixed.reshape(B * T, -1)).reshape(x.shape), stored
