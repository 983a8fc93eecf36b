"""Stochastic rounding: to bfloat16, and to 8 bits with a scale per block. The mean over the bits is the number.

A small change to a large number is lost when rounding to nearest, every time; rounded up as often as it is worth, it is
kept on average (Gupta et al., 2015). All functions take their random bits, 16 a number, as an argument.

Blocks are up to 256 numbers along the last axis (Dettmers et al., 2022), the last block of a row being what is left.
Codes keep the shape of the numbers, so they are cut and named like them; scales have the blocks as their last axis.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8, UInt16, UInt32

BLOCK = 256
# The powers of two that codes 1 to 255 of `to_log8` span. Neighbours differ by 9 percent.
LOG8_RANGE = 32.0

_LOG8_STEP = LOG8_RANGE / 254
_BF16_MAX = float(jnp.finfo(jnp.bfloat16).max)


def hashed_bits(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt16[Array, "..."]:
    """16 bits a number that look random: two rounds of an integer hash (Wellons, 2018) of its place and a key.

    For rounding alone. A generator that could be drawn from for anything costs several times what an update costs that
    it serves; this is a few operations on registers, which fuse into whatever reads the bits.

    Args:
      shape: below 2**32 numbers.
    """
    places = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return (_mixed(_mixed(places ^ key[0]) + key[1]) >> 16).astype(jnp.uint16)


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
    return words ^ (words >> 16)


def to_bf16(x: Float[Array, "*B"], bits: UInt16[Array, "*B"]) -> Float[Array, "*B"]:
    """Rounds float32 to one of the two bfloat16 neighbours; what is not finite, or is one already, stays.

    The bits are added below the mantissa that is kept, whose carry rounds up.
    """
    words = jax.lax.bitcast_convert_type(jnp.clip(x, -_BF16_MAX, _BF16_MAX), jnp.uint32) + bits.astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def largest_of_blocks(x: Float[Array, "*B F"]) -> Float[Array, "*B blocks"]:
    """The largest magnitude of each block, which its scale is made of."""
    F = x.shape[-1]
    size = min(BLOCK, F)
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, -F % size)])
    return padded.reshape(*x.shape[:-1], -1, size).max(axis=-1)


def to_int8(
    x: Float[Array, "*B F"], bits: UInt16[Array, "*B F"], largest: Float[Array, "*B blocks"] | None = None
) -> tuple[Int8[Array, "*B F"], Float[Array, "*B blocks"]]:
    """Rounds to codes -127 to 127 times a scale per block, float32; for numbers of either sign.

    A row of a block with a number that is not finite has a scale that is not finite.

    Args:
      largest: what `largest_of_blocks` gives for x; None: it is called here.
    """
    largest = largest_of_blocks(x) if largest is None else largest
    scales = jnp.where(largest == 0, 1.0, largest) / 127
    codes = jnp.floor(x / _spread(scales, x) + _uniform(bits))
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scales


def from_int8(codes: Int8[Array, "*B F"], scales: Float[Array, "*B blocks"]) -> Float[Array, "*B F"]:
    """The numbers of `to_int8`, float32."""
    return codes.astype(jnp.float32) * _spread(scales, codes)


def to_log8(
    x: Float[Array, "*B F"], bits: UInt16[Array, "*B F"], largest: Float[Array, "*B blocks"] | None = None
) -> tuple[UInt8[Array, "*B F"], Float[Array, "*B blocks"]]:
    """Rounds numbers >= 0 to 0 (code 0) or scale * 2**-((255 - code) * 32 / 254), the scale being the block's largest.

    For mean squares, which are divided by: linear codes would make the small ones of a block 0. Between two codes the
    choice is unbiased in x itself, not in its logarithm, so that averages over time do not drift. What is below the
    smallest code that is not 0 takes that code.

    Args:
      largest: as in `to_int8`.
    """
    largest = largest_of_blocks(x) if largest is None else largest
    scales = jnp.where(largest == 0, 1.0, largest)
    y = x / _spread(scales, x)
    tiny = 2.0**-LOG8_RANGE
    below = jnp.clip(jnp.floor(255 + jnp.log2(jnp.maximum(y, tiny)) / _LOG8_STEP), 1, 254)
    low, high = _log8_value(below), _log8_value(below + 1)
    codes = below + (_uniform(bits) < (y - low) / (high - low))
    # Written without a zero: XLA would store a whole array of them where a step scatters into one of this shape.
    return jnp.where(x <= -x, x, codes).astype(jnp.uint8), scales


def from_log8(codes: UInt8[Array, "*B F"], scales: Float[Array, "*B blocks"]) -> Float[Array, "*B F"]:
    """The numbers of `to_log8`, float32."""
    wide = codes.astype(jnp.float32)
    return jnp.where(codes == 0, wide, _log8_value(wide) * _spread(scales, codes))


def _log8_value(code: Array) -> Array:
    return jnp.exp2((code - 255) * _LOG8_STEP)


def _uniform(bits: Array) -> Array:
    """The middles of 65536 parts of [0, 1]."""
    return (bits.astype(jnp.float32) + 0.5) / 65536


def _spread(scales: Array, like: Array) -> Array:
    """Each number's scale, from that of its block."""
    F = like.shape[-1]
    return jnp.repeat(scales, min(BLOCK, F), axis=-1)[..., :F]
