"""Which places are hidden: nested masks that are a function of (seed, row, variant, place) and of nothing else.

One uniform score per place; at rate r the hidden set is M(r) = {eligible i : score_i < r}. A lower rate with the same
scores hides a subset, so the corruptions of one row at several rates are nested.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.types import AnyArray, Key

# Streams of the mask key, so that scores, replacements, rates and prefixes are independent.
SCORES, REPLACEMENTS, RATES, PREFIXES = 0, 1, 2, 3


def row_key(key: Key, row_id: Int[AnyArray, ""], variant: Int[AnyArray, ""]) -> Key:
    """The key of one corruption of one row."""
    return jax.random.fold_in(jax.random.fold_in(key, row_id), variant)


def uniform_scores(
    key: Key, row_ids: Int[AnyArray, "B"], variants: Int[AnyArray, "B"], length: int
) -> Float[Array, "B T"]:
    """One score in [0, 1) per place, the same whatever batch the row comes in."""
    return jax.vmap(lambda row, variant: jax.random.uniform(row_key(key, row, variant), (length,)))(row_ids, variants)


def hide(
    scores: Float[Array, "B T"], eligible: Bool[Array, "B T"], rates: Float[Array, "B"], *, form: str
) -> Bool[Array, "B T"]:
    """The hidden places of each row at its rate, in the `bernoulli` or the `count` form."""
    return (hide_by_count if form == "count" else hide_by_rate)(scores, eligible, rates)


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


def bound_weights(
    hidden: Bool[Array, "B T"],
    eligible: Bool[Array, "B T"],
    rates: Float[Array, "B"],
    density: Float[Array, "B"],
    *,
    form: str,
) -> Float[Array, "B T"]:
    """Weights of hidden places under which the mean over masks and rates is the bound's mean over the rows' bands.

    density * 1/r where places are hidden by rate, density * n/m where m of n are hidden by count. The width of the band
    is left out: it belongs to whoever adds bands up.

    Args:
      density: what `rates.rates_in` gives beside the rates.
    """
    by_count = jnp.sum(eligible, axis=1) / jnp.maximum(jnp.sum(hidden, axis=1), 1)
    inverse = by_count if form == "count" else 1.0 / rates
    return jnp.where(hidden, (density * inverse)[:, None], 0.0)
