"""From queries, keys and values to what each place mixes: the part of attention that sees other places."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from stackwise_jax.models import weights
from stackwise_jax.models.stores import KernelSums, KeyValues, Store
from stackwise_jax.ops.attention import attention
from stackwise_jax.ops.kernel_features import directions, frequencies, paired_features, positive_features
from stackwise_jax.ops.linear_attention import linear_attention
from stackwise_jax.ops.mask import Mask, within_window
from stackwise_jax.ops.rope import apply_rope, rope_frequencies
from stackwise_jax.schema import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a block needs besides activations.

    Attributes:
      positions: place of each query inside its document.
      mask: a `Mask`, or the array that says which stored keys each query sees when decoding. Where the store holds
        sums it is the `Mask` of the places that are read now, and the past is what the last of them sees.
      write_at: with stored keys, the slot that the first query's key goes to.
      time: what blocks are told of each row's masked fraction (`models.rack.time_vector`), where `model.time_input`.
      cuts_rows: attention inside a window may cut rows into blocks (`ops/window.py`). Not where rows are spread over
        devices: what blocks see is no data of theirs, and would lie whole beside a device's share of them.
    """

    positions: Int[Array, "B T"]
    mask: Mask | Bool[Array, "B 1 T S"]
    write_at: Int[Array, ""] | int = 0
    time: Float[Array, "B C"] | None = None
    cuts_rows: bool = dataclasses.field(default=True, metadata={"static": True})


def rotated(
    x: Float[Array, "B T N H"], context: Context, model: ModelConfig, is_local: weights.Fact | None
) -> Float[Array, "B T N H"]:
    """Queries or keys turned by their positions, where positions are rotary."""
    if model.positions != "rotary":
        return x
    return apply_rope(x, context.positions, _rope_frequencies(model, x.shape[-1], is_local))


def mix(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K V"],
    context: Context,
    stored: Store | None,
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    is_local: weights.Fact | None,
) -> tuple[Float[Array, "B T N V"], Store | None]:
    """Softmax attention, of dot products or of a kernel, or kernel attention in linear time, with what is stored.

    Args:
      queries, keys: after rotation.
      stored: of earlier places; what is returned holds these too. None: the rows attend to themselves alone.
      is_local: whether the block has the model's window, or 1 and 0 for it; None: all blocks are alike.
    """
    if model.is_linear_time:
        return _mix_in_linear_time(queries, keys, values, context, stored, model)
    scale = None
    if model.has_kernel:
        scale = kernel_scale(model)
        queries, keys = (kernel_vectors(x, model).astype(dtype) for x in (queries, keys))
    if stored is not None:
        stored = typing.cast(KeyValues, stored).write(keys, values, context.write_at)
        keys, values = stored.keys.astype(dtype), stored.values.astype(dtype)
    mask = within_reach(context, model, is_local, keys.shape[1])
    mixed = attention(queries, keys, values, mask, implementation=model.attention_implementation, scale=scale)
    return mixed, stored


def within_reach(
    context: Context, model: ModelConfig, is_local: weights.Fact | None, length: int
) -> Mask | Bool[Array, "B 1 T S"]:
    """The mask of a block, cut to the model's window unless the block is one of those that reach all `length` keys."""
    if model.window is None or is_local is False:
        return context.mask
    window: Array | int = model.window
    if is_local is not None and is_local is not True:
        window = jnp.where(is_local > 0, window, length)
    elif not context.cuts_rows:
        window = jnp.int32(window)
    return within_window(context.mask, window, context.write_at)


def kernel_vectors(x: Float[Array, "B T N H"], model: ModelConfig) -> Float32[Array, "B T N M"]:
    """Vectors whose products are the model's kernel of queries and keys, N heads of either."""
    kernel, width = model.kernel, x.shape[-1]
    if kernel.family == "linear":
        return x.astype(jnp.float32) * (1.0 / math.sqrt(width))
    family = typing.cast(str, kernel.family)
    usual = float(width) if family == "laplacian" else math.sqrt(width)
    bandwidth = usual if kernel.bandwidth is None else kernel.bandwidth
    count = kernel.n_features // 2
    own = frequencies(family, _key_heads(model), width, count, bandwidth=bandwidth, seed=kernel.seed)
    return paired_features(x, own)


def kernel_scale(model: ModelConfig) -> float:
    """What the kernel is multiplied by in the exponent. By default a query and a key that are equal, with entries of
    unit variance, weigh as much as under dot products."""
    if model.kernel.scale is not None:
        return model.kernel.scale
    return 1.0 if model.is_linear_time else math.sqrt(weights.key_width(model))


def _mix_in_linear_time(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K V"],
    context: Context,
    stored: Store | None,
    model: ModelConfig,
) -> tuple[Float[Array, "B T N V"], KernelSums | None]:
    if not isinstance(context.mask, Mask):
        raise ValueError("attention in linear time keeps no places, so no array can say which of them are seen")
    width, count = weights.product_width(model), model.kernel.positive_features
    own, scale = directions(_key_heads(model), width, count, seed=model.kernel.seed), kernel_scale(model)
    q, k = (
        positive_features(kernel_vectors(x, model), own, scale=scale, of_queries=of_queries)
        for x, of_queries in ((queries, True), (keys, False))
    )
    past = None if stored is None else typing.cast(KernelSums, stored).sums
    mixed, sums = linear_attention(q, k, values, context.mask, sums=past)
    return mixed, None if stored is None else KernelSums(sums)


def _key_heads(model: ModelConfig) -> int:
    return typing.cast(int, model.n_kv_heads)


def _rope_frequencies(
    model: ModelConfig, width: int, is_local: weights.Fact | None
) -> Float32[Array | np.ndarray, "h"]:
    """Of rotary positions; those of a local block may have a base of their own."""
    of_all = rope_frequencies(width, model.rope_theta, model.rope_scaling)
    if is_local is None or is_local is False or model.rope_theta_local is None:
        return of_all
    of_local = rope_frequencies(width, model.rope_theta_local, model.rope_scaling)
    return of_local if is_local is True else jnp.where(is_local > 0, of_local, of_all)
