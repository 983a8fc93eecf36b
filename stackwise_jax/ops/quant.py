"""Storage formats of frozen matrices: a few bits an entry and scales, decoded in front of the matmul.

    fp8    E4M3 (Micikevicius et al., 2022), blocks of 128 x 128, a float32 scale each            8.002 bits
    nvfp4  E2M1, blocks of 16, an E4M3 scale each, one float32 scale a matrix (NVIDIA, 2025)      4.5
    nf4    16 normal quantiles, blocks of 64, double quantisation (Dettmers et al., 2023)         4.127

Blocks of the 4-bit formats run along the contracted axis `D` of a matrix [D F], and its rows 2i and 2i + 1 share a byte
(the even one in the low half). Where the blocks do not divide D, rows of zeros are added and stored; blocks of 128 x
128 at the edges are smaller. Nothing is refused. Every matrix of a stack has scales of its own, so that all arrays keep
the stack's leading block axis and are sliced by a scan over it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from stackwise_jax.types import Quantised

FORMATS = ("fp8", "nvfp4", "nf4")

FP8_BLOCK, NVFP4_BLOCK, NF4_BLOCK, NF4_GROUP = 128, 16, 64, 256

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; bit 3 is the sign
# Dettmers et al. (2023), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_TABLE = np.array(NF4, np.float32)

_E4M3 = jnp.float8_e4m3fn
_E4M3_MAX, _E4M3_LEAST = 448.0, 2.0**-9


def encode(weight: Float[Array, "*L D F"], kind: str) -> Quantised:
    """Converts matrices to a storage format, rounding each entry to the nearest that the format has.

    Args:
      weight: any leading axes; computed with in float32.
      kind: one of `FORMATS`.

    Raises:
      ValueError: no such format.
    """
    D, F = weight.shape[-2:]
    wide = weight.astype(jnp.float32)
    if kind == "fp8":
        codes, scales = _encode_fp8(wide)
    elif kind == "nvfp4":
        codes, scales = _encode_nvfp4(wide)
    elif kind == "nf4":
        codes, scales = _encode_nf4(wide)
    else:
        raise ValueError(f"kind={kind!r} must be one of: {', '.join(FORMATS)}")
    return Quantised(codes, scales, kind, (D, F))


def decode(weight: Quantised, dtype: DTypeLike) -> Float[Array, "*L D F"]:
    """The matrices that `encode` stored, computed in float32 and rounded once, to `dtype`."""
    return (_decode_fp8(weight) if weight.kind == "fp8" else _decode_4_bits(weight)).astype(dtype)


def multiply_row(x: Float[Array, "D"], weight: Quantised) -> Float32[Array, "F"]:
    """x @ the matrix that `encode` stored, for one row, in float32.

    One row meets each weight once, so numbers are decoded as they are summed and never written out: on an accelerator
    the matrix is read in its stored bytes and nothing else is.
    """
    wide = x.astype(jnp.float32)
    if weight.kind == "fp8":
        return jnp.sum(wide[:, None] * _decode_fp8(weight), axis=0)
    half, F = weight.codes.shape
    numbers, steps = _NUMBERS[weight.kind], _steps(weight)
    pairs = jnp.pad(wide, (0, 2 * half - len(x))).reshape(len(steps), -1, 2, 1)
    codes = weight.codes.reshape(len(steps), -1, F)
    products = pairs[:, :, 0] * numbers(codes & 15) + pairs[:, :, 1] * numbers(codes >> 4)
    return jnp.sum(products * steps[:, None, :], axis=(0, 1))


@functools.lru_cache
def stored_bytes(shape: tuple[int, int], kind: str) -> int:
    """Bytes of one matrix in a format: codes, padding and scales."""
    stored = jax.eval_shape(lambda: encode(jnp.zeros(shape), kind))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def _nonzero(largest: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Largest magnitudes to divide by: 1 where everything is 0."""
    return jnp.where(largest > 0, largest, 1.0)


# fp8


def _encode_fp8(wide: Float[Array, "*L D F"]) -> tuple[Array, dict[str, Array]]:
    *leading, D, F = wide.shape
    rows, columns = math.ceil(D / FP8_BLOCK), math.ceil(F / FP8_BLOCK)
    padding = [(0, 0)] * len(leading) + [(0, rows * FP8_BLOCK - D), (0, columns * FP8_BLOCK - F)]
    blocks = jnp.pad(jnp.abs(wide), padding).reshape(*leading, rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = _nonzero(jnp.max(blocks, axis=(-3, -1))) / _E4M3_MAX
    # The quotient may round to a number beyond the largest, which in this format is no number.
    codes = jnp.clip(wide / _over_blocks(scales, D, F), -_E4M3_MAX, _E4M3_MAX).astype(_E4M3)
    return codes, {"block": scales}


def _decode_fp8(weight: Quantised) -> Float[Array, "*L D F"]:
    return weight.codes.astype(jnp.float32) * _over_blocks(weight.scales["block"], *weight.shape)


def _over_blocks(scales: Float[Array, "*L d f"], D: int, F: int) -> Float[Array, "*L D F"]:
    """Each entry's scale."""
    return jnp.repeat(jnp.repeat(scales, FP8_BLOCK, axis=-2)[..., :D, :], FP8_BLOCK, axis=-1)[..., :F]


# Four bits


def _encode_nvfp4(wide: Float[Array, "*L D F"]) -> tuple[Array, dict[str, Array]]:
    blocks = _blocks(wide, NVFP4_BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    matrix = _nonzero(jnp.max(largest, axis=(-2, -1))) / (_E4M3_MAX * E2M1[-1])
    ratios = largest / (E2M1[-1] * matrix[..., None, None])
    scales = jnp.clip(ratios, _E4M3_LEAST, _E4M3_MAX).astype(_E4M3)
    steps = scales.astype(jnp.float32) * matrix[..., None, None]
    return _pack(_nearest_e2m1(blocks / steps[..., None, :])), {"block": scales, "matrix": matrix}


def _encode_nf4(wide: Float[Array, "*L D F"]) -> tuple[Array, dict[str, Array]]:
    """Entries relative to their block's largest; these, less their mean, in E4M3 with a float32 scale a group."""
    blocks = _blocks(wide, NF4_BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    codes = _pack(_nearest_nf4(blocks / _nonzero(largest)[..., None, :]))
    mean = jnp.mean(largest, axis=(-2, -1))
    groups = _groups(largest - mean[..., None, None])
    group = _nonzero(jnp.max(jnp.abs(groups), axis=-1)) / _E4M3_MAX
    quotients = jnp.clip(groups / group[..., None], -_E4M3_MAX, _E4M3_MAX)
    scales = quotients.reshape(*mean.shape, -1)[..., : math.prod(largest.shape[-2:])].reshape(largest.shape)
    return codes, {"block": scales.astype(_E4M3), "group": group, "mean": mean}


def _nf4_scales(weight: Quantised) -> Float[Array, "*L n F"]:
    """The blocks' largest magnitudes, as far as double quantisation keeps them."""
    stored, mean = weight.scales["block"], weight.scales["mean"]
    groups = _groups(stored.astype(jnp.float32)) * weight.scales["group"][..., None]
    flat = groups.reshape(*mean.shape, -1)[..., : math.prod(stored.shape[-2:])]
    return flat.reshape(stored.shape) + mean[..., None, None]


def _groups(scales: Float[Array, "*L n F"]) -> Float[Array, "*L m group"]:
    """The block scales of each matrix in groups of `NF4_GROUP`, row by row, the last one filled up with zeros."""
    *leading, n, F = scales.shape
    padding = [(0, 0)] * len(leading) + [(0, -(n * F) % NF4_GROUP)]
    return jnp.pad(scales.reshape(*leading, n * F), padding).reshape(*leading, -1, NF4_GROUP)


def _blocks(wide: Float[Array, "*L D F"], size: int) -> Float[Array, "*L n size F"]:
    *leading, D, F = wide.shape
    padding = [(0, 0)] * len(leading) + [(0, -D % size), (0, 0)]
    return jnp.pad(wide, padding).reshape(*leading, -1, size, F)


def _decode_4_bits(weight: Quantised) -> Float[Array, "*L D F"]:
    """Each code's number times its block's step, without the rows that fill up the last block."""
    *leading, half, F = weight.codes.shape
    numbers, steps = _NUMBERS[weight.kind], _steps(weight)
    codes = jnp.stack([weight.codes & 15, weight.codes >> 4], axis=-2).reshape(*leading, steps.shape[-2], -1, F)
    values = numbers(codes) * steps[..., None, :]
    return values.reshape(*leading, 2 * half, F)[..., : weight.shape[0], :]


def _steps(weight: Quantised) -> Float[Array, "*L n F"]:
    """What the numbers of each block are multiplied by."""
    if weight.kind == "nf4":
        return _nf4_scales(weight)
    return weight.scales["block"].astype(jnp.float32) * weight.scales["matrix"][..., None, None]


def _e2m1_numbers(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """What codes stand for, without a table to look up in: from 1.0 on their bits are a float32's, moved and biased."""
    magnitude = (codes & 7).astype(jnp.uint32)
    below_one = magnitude * jnp.uint32(0x3F000000)  # the bits of 0.0 or of 0.5
    bits = jnp.where(magnitude < 2, below_one, (magnitude << 22) + jnp.uint32(126 << 23))
    sign = (codes & 8).astype(jnp.uint32) << 28
    return jax.lax.bitcast_convert_type(bits | sign, jnp.float32)


def _nf4_numbers(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.asarray(_NF4_TABLE).at[codes].get(mode="promise_in_bounds")  # a code has four bits


_NUMBERS = {"nvfp4": _e2m1_numbers, "nf4": _nf4_numbers}


def _pack(codes: Int[Array, "*L n size F"]) -> UInt8[Array, "*L half F"]:
    """Two rows to a byte."""
    *leading, n, size, F = codes.shape
    pairs = codes.astype(jnp.uint8).reshape(*leading, n * size // 2, 2, F)
    return pairs[..., 0, :] | (pairs[..., 1, :] << 4)


def _nearest_e2m1(values: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Codes of the nearest numbers; of two equally near ones the even code, as IEEE 754 rounds."""
    magnitudes, codes = jnp.abs(values), jnp.zeros(values.shape, jnp.int32)
    for code in range(1, len(E2M1)):
        middle = (E2M1[code - 1] + E2M1[code]) / 2
        reached = magnitudes >= middle if code % 2 == 0 else magnitudes > middle
        codes += reached.astype(jnp.int32)
    return codes | (jnp.signbit(values).astype(jnp.int32) << 3)


def _nearest_nf4(values: Float[Array, "*n"]) -> Int[Array, "*n"]:
    codes = jnp.zeros(values.shape, jnp.int32)
    for code in range(1, len(NF4)):
        codes += (values > np.float32((NF4[code - 1] + NF4[code]) / 2)).astype(jnp.int32)
    return codes
