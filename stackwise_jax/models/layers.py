"""The leaves: linear map, norm, feed-forward, dropout. They read weights; `weights.py` says what those are."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.models.weights import fixed_maps
from stackwise_jax.ops.activation import activate
from stackwise_jax.ops.matmul import as_array, matmul
from stackwise_jax.ops.norm import normalise
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key, Params


class Linear(nn.Module):
    """x @ kernel + bias. Reads with `get_variable`, which leaves the storage of the kernel to `ops.matmul`."""

    dtype: DTypeLike
    in_fp8: bool = False
    is_fixed: bool = False

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel = self.get_variable("params", "kernel")
        y = matmul(x, as_fixed(kernel) if self.is_fixed else kernel, dtype=self.dtype, in_fp8=self.in_fp8)
        bias = self.bias()
        return y if bias is None else jnp.add(y, _as_row(bias, y))

    def array(self) -> Float[Array, "D F"]:
        """The map as an array, for products that go through it another way."""
        return as_array(self.get_variable("params", "kernel"), dtype=self.dtype)

    def bias(self) -> Float[Array, "F"] | None:
        """What the map adds, if anything."""
        bias = self.get_variable("params", "bias")
        return None if bias is None else bias.astype(self.dtype)


def as_fixed(kernel: Any) -> Any:
    """A kernel that takes no gradient. Only arrays ever do: what is stored otherwise is settled but for its adapter."""
    return jax.lax.stop_gradient(kernel) if isinstance(kernel, jax.Array) else kernel


Modulation = tuple[Float[Array, "B D"], Float[Array, "B D"]]
"""What a norm's output is multiplied by, less 1, and shifted by, in float32: the same for all places of a row."""


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), in float32 inside, in x's dtype outside."""

    model: ModelConfig

    def __call__(self, x: Float[Array, "*B D"], modulation: Modulation | None = None) -> Float[Array, "*B D"]:
        scale, bias = self.get_variable("params", "scale"), self.get_variable("params", "bias")
        return apply_norm(scale, bias, x, self.model, modulation)


def apply_norm(
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    x: Float[Array, "*B D"],
    model: ModelConfig,
    modulation: Modulation | None = None,
) -> Float[Array, "*B D"]:
    """Normalises the last axis; `bias` is None for RMSNorm. Under a modulation (s, t) y becomes y * (1 + s) + t."""
    row_scale, row_bias = scale, bias
    if modulation is not None:
        # Scale and bias of each row, so that the norm does it in the pass that it makes anyway, and keeps no more.
        factor, shift = 1.0 + modulation[0], modulation[1]
        row_scale = scale.astype(jnp.float32)[None, :] * factor
        row_bias = shift if bias is None else bias.astype(jnp.float32)[None, :] * factor + shift
    return normalise(x, row_scale, row_bias, subtracts_mean=model.norm == "layernorm", epsilon=model.norm_epsilon)


def modulations(adaptive: Params, time: Float[Array, "B C"] | None, n_norms: int) -> list[Modulation]:
    """The modulation of each of `n_norms` norms, a linear function of the time vector (Peebles and Xie, 2023).

    In float32 whatever the rest is in: it is computed once a row, not once a token.

    Args:
      adaptive: "kernel" [C, 2 * n_norms * D], of any storage, and "bias"; scale and shift of the first norm, then of
        the next.

    Raises:
      ValueError: there is no time vector.
    """
    if time is None:
        raise ValueError("a model with time_input=True needs the time: Context.time is None")
    mapped = matmul(time, adaptive["kernel"], dtype=jnp.float32) + adaptive["bias"].astype(jnp.float32)[None, :]
    parts = jnp.split(mapped, 2 * n_norms, axis=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _as_row(vector: Array, like: Array) -> Array:
    """Gives a vector the rank of `like`, so that broadcasting over it is explicit."""
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)) for SwiGLU and GeGLU (Shazeer, 2020), down(act(up(x))) for GELU."""

    model: ModelConfig
    dtype: DTypeLike
    in_fp8: bool = False

    def setup(self) -> None:
        for name in ("up", "down", "gate") if self.model.is_gated else ("up", "down"):
            setattr(self, name, Linear(self.dtype, self.in_fp8, name in fixed_maps(self.model)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        rows = x.reshape(-1, x.shape[-1])  # once, so that the backward pass keeps it once
        if self.model.is_gated:
            hidden = activate(self.gate(rows), self.up(rows), self.model.ffn)
        else:
            hidden = activate(self.up(rows), None, self.model.ffn)
        return self.down(hidden).reshape(x.shape)


def dropout(x: Float[Array, "B T D"], rate: float, key: Key | None) -> Float[Array, "B T D"]:
    """Zeroes a share `rate` of the entries and scales the rest up; without a key, or at rate 0, returns x.

    An entry costs 16 random bits, half a word of the generator, so the rate is a multiple of 2**-16; what is kept is
    scaled by that very rate, which leaves the mean as it was.
    """
    kept_of_65536 = max(1, round((1.0 - rate) * 65536))
    if key is None or kept_of_65536 == 65536:
        return x
    *leading, width = x.shape
    words = jax.random.bits(key, (*leading, (width + 1) // 2), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, -1)[..., :width]
    scaled = (x.astype(jnp.float32) * (65536 / kept_of_65536)).astype(x.dtype)
    return jnp.where(draws < jnp.uint16(kept_of_65536), scaled, jnp.zeros_like(x))
