"""One Transformer block."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from stackwise_jax.models import weights
from stackwise_jax.models.experts import ExpertFeedForward
from stackwise_jax.models.latent_attention import LatentAttention, LowRankAttention
from stackwise_jax.models.layers import FeedForward, Linear, Modulation, Norm, dropout, modulations
from stackwise_jax.models.mixing import Context, mix, rotated
from stackwise_jax.models.stores import Store
from stackwise_jax.ops.mask import Mask
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention (Vaswani et al., 2017; Ainslie et al., 2023), also of kernels."""

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        self.query, self.key, self.value, self.output = (Linear(self.dtype, self.in_fp8) for _ in range(4))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        stored: Store | None,
        is_local: weights.Fact | None = None,
    ) -> tuple[Float[Array, "B T D"], Store | None]:
        B, T, _ = x.shape
        model = self.model
        rows = x.reshape(B * T, -1)  # once, so that the backward pass keeps it once
        queries = self.query(rows).reshape(B, T, model.n_heads, model.d_head)
        keys = self.key(rows).reshape(B, T, model.n_kv_heads, model.d_head)
        values = self.value(rows).reshape(B, T, model.n_kv_heads, model.d_head)
        queries, keys = (rotated(x, context, model, is_local) for x in (queries, keys))
        mixed, stored = mix(queries, keys, values, context, stored, model, dtype=self.dtype, is_local=is_local)
        return self.output(mixed.reshape(B * T, -1)).reshape(x.shape), stored


def _attention_of(model: ModelConfig) -> type[Attention | LatentAttention | LowRankAttention]:
    if not model.has_latents:
        return Attention
    return LatentAttention if model.latent.form == "shared" else LowRankAttention


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a norm before (pre) or after the sum (post).

    With `model.stability.residual_gain` what both add is multiplied by one learned number of the block (ReZero;
    Bachlechner et al., 2021). With `model.time_input` both norms, in either position, are scaled and shifted by what
    the time vector maps to (adaptive norms; Peebles and Xie, 2023, without their gates).

    Beside the activations and what is stored it returns what a router adds to the training loss, a token; without
    experts, nothing.
    """

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        self.attention_norm, self.mlp_norm = Norm(self.model), Norm(self.model)
        self.attention = _attention_of(self.model)(self.model, self.dtype, self.in_fp8)
        if self.model.has_experts:
            self.mlp = ExpertFeedForward(self.model, self.dtype)
        else:
            self.mlp = FeedForward(self.model, self.dtype, self.in_fp8)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        key: Key | None = None,
        stored: Store | None = None,
    ) -> tuple[Float[Array, "B T D"], Store | None, Float32[Array, ""] | None]:
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        is_local = self._fact("is_local")
        attention_change, mlp_change = self._modulations(context)
        context = self._directed(context)
        if self.model.norm_position == "pre":
            mixed, stored = self.attention(self._read(x, attention_change), context, stored, is_local)
            x = x + self._branch(mixed, attention_key)
            added, penalty = self._feed_forward(self.mlp_norm(x, mlp_change), context)
            return x + self._branch(added, mlp_key), stored, penalty
        mixed, stored = self.attention(x, context, stored, is_local)
        x = self.attention_norm(x + self._branch(mixed, attention_key), attention_change)
        added, penalty = self._feed_forward(x, context)
        return self.mlp_norm(x + self._branch(added, mlp_key), mlp_change), stored, penalty

    def _feed_forward(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Float32[Array, ""] | None]:
        """With the penalty of a router, which padding has no part in where it is known."""
        if isinstance(self.mlp, FeedForward):
            return self.mlp(x), None
        counted: Bool[Array, "B T"] | None = None
        if isinstance(context.mask, Mask) and context.mask.segments is not None:
            counted = context.mask.segments > 0
        return self.mlp(x, counted)

    def _directed(self, context: Context) -> Context:
        """The context of a block that may be one of those that look back alone.

        Raises:
          ValueError: earlier places are stored, of which blocks that look ahead have none that would stay as they are.
        """
        is_causal = self._fact("is_causal")
        if is_causal is None or is_causal is False:
            return context
        if not isinstance(context.mask, Mask):
            raise ValueError("a rack with model.causal_from is read whole: its first blocks see places to come")
        if is_causal is True and context.mask.kind == "bidirectional":
            return dataclasses.replace(context, mask=dataclasses.replace(context.mask, kind="causal"))
        ahead = 0 if is_causal is True else jnp.where(is_causal > 0, 0, context.positions.shape[1])
        return dataclasses.replace(context, mask=dataclasses.replace(context.mask, ahead=ahead))

    def _modulations(self, context: Context) -> tuple[Modulation | None, Modulation | None]:
        """Of the two norms."""
        if not self.model.time_input:
            return None, None
        of_attention, of_mlp = modulations(self.get_variable("params", "adaptive"), context.time, 2)
        return of_attention, of_mlp

    def _fact(self, name: str) -> weights.Fact | None:
        """See `weights.block_facts`; None where all blocks are alike in it."""
        fact = self.get_variable("params", name)
        return fact if fact is None or isinstance(fact, bool) else jax.lax.stop_gradient(fact)

    def _read(self, x: Float[Array, "B T D"], change: Modulation | None) -> Float[Array, "B T D"]:
        """What attention reads of a pre-norm block; without a norm nothing tells it the time."""
        is_first = self._fact("is_first")
        if is_first is True:
            return x
        normed = self.attention_norm(x, change)
        return normed if is_first is None or is_first is False else jnp.where(is_first > 0, x, normed)

    def _branch(self, added: Float[Array, "B T D"], key: Key | None) -> Float[Array, "B T D"]:
        """What a residual connection adds, after dropout and the block's gain."""
        added = dropout(added, self.model.dropout, key)
        if self.model.stability.residual_gain is None:
            return added
        return self.get_variable("params", "residual_gain").astype(added.dtype) * added
