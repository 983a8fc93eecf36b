"""Random features: vectors whose inner products are kernels of their arguments, or exponentials of these.

Random kitchen sinks (Rahimi and Recht, 2007): with frequencies w drawn from the Fourier transform of a kernel of x - y,
cos(w x) and sin(w x) of many w have it as their inner product.

    gaussian   exp(-|x - y|^2 / 2)                       normal frequencies
    laplacian  exp(-|x_1 - y_1| - .. - |x_H - y_H|)      Cauchy frequencies
    uniform    the product over i of sinc(x_i - y_i)     uniform frequencies in (-1, 1); sinc(z) = sin(z) / z
    linear     x y / H                                   none: the features are x / sqrt(H)

all of x and y over the bandwidth. The error of n frequencies is that of a mean of n draws: it falls like 1 / sqrt(n).
Features are fixed numbers of a seed: they are neither trained nor stored, and the same in every block.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

FAMILIES = ("gaussian", "laplacian", "uniform", "linear")

# Added to positive features of keys: a query that all features of all keys have left (each below e^-14) mixes them
# evenly, where it would divide zero by zero.
FLOOR = 1e-6

# Streams of a seed, so that frequencies and directions are not the same numbers.
_FREQUENCIES, _DIRECTIONS = 0, 1


@functools.lru_cache
def frequencies(
    family: str, n_heads: int, width: int, count: int, *, bandwidth: float, seed: int
) -> Float32[np.ndarray, "K F H"]:
    """`count` frequencies for each key head, which its query heads share.

    Raises:
      ValueError: a family without frequencies.
    """
    shape = (n_heads, count, width)
    if family == "gaussian":
        drawn = _normal(seed, _FREQUENCIES, shape)
    elif family == "laplacian":
        drawn = np.tan(np.pi * (_uniform(seed, _FREQUENCIES, shape) - 0.5))
    elif family == "uniform":
        drawn = 2.0 * _uniform(seed, _FREQUENCIES, shape) - 1.0
    else:
        raise ValueError(f"family={family!r} has no frequencies; those that have are gaussian, laplacian and uniform")
    return _fixed(drawn / bandwidth)


@functools.lru_cache
def directions(n_heads: int, width: int, count: int, *, seed: int) -> Float32[np.ndarray, "K M H"]:
    """Normal vectors for `positive_features`, `count` for each key head."""
    return _fixed(_normal(seed, _DIRECTIONS, (n_heads, count, width)))


def paired_features(
    x: Float[Array, "B T N H"], frequencies: Float32[Array | np.ndarray, "K F H"]
) -> Float32[Array, "B T N M"]:
    """sqrt(1 / F) [cos(w x), sin(w x)] of the F frequencies w of each head, M = 2 F.

    An inner product of two is the mean over w of cos(w (x - y)), in expectation the kernel; of one with itself, 1.

    Args:
      x: queries, or keys (N = K); query head n reads the frequencies of key head n // (N / K).
    """
    angles = _products(x, frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1) * (1.0 / math.sqrt(frequencies.shape[1]))


def positive_features(
    u: Float[Array, "B T N H"],
    directions: Float32[Array | np.ndarray, "K M H"],
    *,
    scale: float,
    of_queries: bool,
) -> Float32[Array, "B T N M"]:
    """sqrt(1 / M) exp(sqrt(scale) d u - scale |u|^2 / 2) of the M directions d of each head (Choromanski et al., 2021).

    An inner product of two is exp(scale * u u') in expectation; its relative variance is exp(scale |u + u'|^2) / M.

    Args:
      u: as x in `paired_features`.
      of_queries: each vector is divided by its largest entry, which cancels where weights are normalised; else
        `FLOOR` is added.
    """
    wide = u.astype(jnp.float32)
    exponents = math.sqrt(scale) * _products(wide, directions)
    exponents = exponents - 0.5 * scale * jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    if of_queries:
        exponents = exponents - jax.lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True))
    return (jnp.exp(exponents) + (0.0 if of_queries else FLOOR)) * (1.0 / math.sqrt(directions.shape[1]))


def _products(x: Float[Array, "B T N H"], vectors: Float32[Array | np.ndarray, "K F H"]) -> Float32[Array, "B T N F"]:
    """Each head with the vectors of its key head; float32, because the angles of high frequencies are large."""
    B, T, N, H = x.shape
    K, F, _ = vectors.shape
    grouped = x.astype(jnp.float32).reshape(B, T, K, N // K, H)
    return jnp.einsum("BTKGH,KFH->BTKGF", grouped, jnp.asarray(vectors), precision="highest").reshape(B, T, N, F)


def _fixed(drawn: np.ndarray) -> np.ndarray:
    """float32 that nobody can write to, since all callers share it."""
    numbers = drawn.astype(np.float32)
    numbers.setflags(write=False)
    return numbers


def _uniform(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in (0, 1), of Philox's raw words, which numpy promises to keep."""
    words = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(math.prod(shape))
    return ((words >> np.uint64(11)) + 0.5).reshape(shape) / 2.0**53


def _normal(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Box and Muller (1958)."""
    first, second = _uniform(seed, stream, (2, *shape))
    return np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second)
