"""Which places are hidden: nested masks that are a function of (seed, row, variant, place) and of nothing else.

One uniform score per place; at rate r the hidden set is M(r) = {eligible i : score_i < r}. A lower rate with the same
scores hides a subset, so the corruptions of one row at several rates are nested.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from stackwise_jax.types import Key

# 2**32 divided by the golden ratio: the additive recurrence with the lowest discrepancy (Knuth, TAOCP 3, 6.4).
_GOLDEN = 2654435769


def row_key(key: Key, row_id: Int[Array, ""], variant: Int[Array, ""]) -> Key:
    """The key of one corruption of one row."""
    return jax.random.fold_in(jax.random.fold_in(key, row_id), variant)


def uniform_scores(key: Key, row_ids: Int[Array, "B"], variants: Int[Array, "B"], length: int) -> Float[Array, "B T"]:
    """One score in [0, 1) per place, the same whatever batch the row comes in."""
    return jax.vmap(lambda row, variant: jax.random.uniform(row_key(key, row, variant), (length,)))(row_ids, variants)


def low_discrepancy_rates(
    key: Key, row_ids: Int[Array, "B"], variants: Int[Array, "B"], *, n_rows: int, low: float, high: float
) -> Float[Array, "B"]:
    """Rates in (low, high] that cover the interval evenly over rows and variants.

    frac(hash(seed) + golden ratio * (row + n_rows * variant)), in 32-bit integers so that no index is too large.
    """
    index = row_ids.astype(jnp.uint32) + jnp.uint32(n_rows) * variants.astype(jnp.uint32)
    start: UInt32[Array, ""] = jax.random.bits(key, dtype=jnp.uint32)
    sequence = start + jnp.uint32(_GOLDEN) * index
    # 24 bits fit a float32 exactly; 1 - u turns [0, 1) into (0, 1].
    unit = 1.0 - (sequence >> 8).astype(jnp.float32) / float(2**24)
    return low + (high - low) * unit


def hide_by_rate(
    scores: Float[Array, "B T"], eligible: Bool[Array, "B T"], rates: Float[Array, "B"]
) -> Bool[Array, "B T"]:
    """M(r): each eligible place independently with probability r. An unbiased sum over it weighs each place 1/r."""
    return eligible & (scores < rates[:, None])


def hide_by_count(
    scores: Float[Array, "B T"], eligible: Bool[Array, "B T"], rates: Float[Array, "B"]
) -> Bool[Array, "B T"]:
    """The ceil(r n) eligible places with the smallest scores, at least one, of n.

    With r uniform on (0, 1] the count m is uniform on 1..n, and an unbiased sum weighs each place n/m (not 1/r). A row
    with no eligible place hides nothing.
    """
    ranked = jnp.where(eligible, scores, 2.0)
    n = jnp.sum(eligible, axis=1)
    # A float32 rate such as 0.15 lies a rounding above itself; without the slack 100 places would hide 16.
    m = jnp.clip(jnp.ceil(rates * (n * (1.0 - 2.0**-22))).astype(jnp.int32), jnp.minimum(n, 1), n)
    rank = jnp.argsort(jnp.argsort(ranked, axis=1), axis=1)
    return eligible & (rank < m[:, None])
