"""Orders that never change: permutations that are functions of a few integers, in every version of every library."""

import functools

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 4  # of two half-rounds each
_LEAST_BITS = 6  # fewer leave some orders of 5 to 8 places out


@functools.lru_cache(maxsize=8)  # the batches of one chunk and epoch, and the next that is read ahead
def permutation(n: int, *seeds: int) -> Int64[np.ndarray, "_"]:
    """An order of 0 .. n - 1 that is a function of the arguments, as an array.

    Sorted raw words, because NumPy promises those for good and the shuffles of its `Generator` only for one version;
    Grain's own `shuffle` needs 0.1 to 1 ms an index when a range is as short as a chunk.
    """
    words = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(n)
    return np.argsort(words, kind="stable")


def permuted(places: Int64[np.ndarray, "B"], n: int, keys: UInt64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
    """Where the permutation of 0 .. n - 1 that each key names sends each place, in memory that does not grow with n.

    A Feistel network over the bits of n - 1, walked until it lands below n (Black and Rogaway, 2002): twice
    on average at most, from 32 places on.
    """
    n_bits = max(_LEAST_BITS, (n - 1).bit_length())
    words = _walk(places.astype(np.uint64), keys, n_bits)
    while (outside := words >= n).any():
        words[outside] = _walk(words[outside], keys[outside], n_bits)
    return words.astype(np.int64)


# Called for every row that is read: without shapes in their annotations, whose checks would take most of a test's time.
def _walk(words: np.ndarray, keys: np.ndarray, n_bits: int) -> np.ndarray:
    low_bits = np.uint64((n_bits + 1) // 2)
    low_mask, high_mask = np.uint64(2 ** ((n_bits + 1) // 2) - 1), np.uint64(2 ** (n_bits // 2) - 1)
    high, low = words >> low_bits, words & low_mask
    for number in range(_ROUNDS):
        high = high ^ (_finalised(_finalised(keys + np.uint64(2 * number)) ^ low) & high_mask)
        low = low ^ (_finalised(_finalised(keys + np.uint64(2 * number + 1)) ^ high) & low_mask)
    return (high << low_bits) | low


def mixed(keys: UInt64[np.ndarray, "*B"], words: UInt64[np.ndarray, "*B"]) -> UInt64[np.ndarray, "*B"]:
    """A word of 64 even bits out of each pair: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), twice."""
    return _finalised(_finalised(keys) ^ words)


def _finalised(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
