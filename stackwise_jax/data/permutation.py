"""Orders that never change: permutations that are functions of a few integers, in every version of every library."""

import functools

import numpy as np
from jaxtyping import Int64


@functools.lru_cache(maxsize=8)  # the batches of one chunk and epoch, the next that is read ahead, and the rows' own
def permutation(n: int, *seeds: int) -> Int64[np.ndarray, "_"]:
    """An order of 0 .. n - 1 that is a function of the arguments.

    Sorted raw words, because NumPy promises those for good and the shuffles of its `Generator` only for one version;
    Grain's own `shuffle` needs 0.1 to 1 ms an index when a range is as short as a chunk.
    """
    words = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(n)
    return np.argsort(words, kind="stable")
