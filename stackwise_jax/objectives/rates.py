"""At which masked fraction a row is corrupted, and how much a draw counts.

A rate r is a function g(t) of a time that is uniform over what a band of rates spans, so a schedule g decides how
often a rate is seen and not what is estimated: `rates_in` gives the weight that turns any schedule's mean over t into
the mean over rates that are uniform in the band. With survival alpha(t) = 1 - g(t) that weight over r is the
-alpha'(t) / (1 - alpha(t)) of MDLM and MD4, times the width in t over the width in r.
"""

import dataclasses
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from stackwise_jax.objectives.masks import row_key
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import AnyArray, Batch, Key

# 2**32 divided by the golden ratio: the additive recurrence with the lowest discrepancy (Knuth, TAOCP 3, 6.4).
_GOLDEN = 2654435769
MEAN_DRAWS = 256  # that stand for all in a mean

Curve = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A rising map from time to masked fraction, both from 0 to 1.

    Attributes:
      rate: g(t).
      time: its inverse.
      slope: g'(t).
    """

    rate: Curve
    time: Curve
    slope: Curve


SCHEDULES = {
    "linear": Schedule(lambda t: t, lambda r: r, jnp.ones_like),
    # MD4's alpha(t) = 1 - cos(pi/2 (1 - t)); the sine is as precise near 0 as anywhere.
    "cosine": Schedule(
        lambda t: jnp.sin(math.pi / 2 * t),
        lambda r: jnp.arcsin(r) * (2 / math.pi),
        lambda t: math.pi / 2 * jnp.cos(math.pi / 2 * t),
    ),
    # alpha(t) = 1 - t**2.
    "polynomial": Schedule(jnp.square, jnp.sqrt, lambda t: 2.0 * t),
}


def row_bands(batch: Batch, config: ObjectiveConfig) -> Float[Array, "B 2"]:
    """(low, high) of each row's rates: `batch.bands`, or the config's whole range."""
    if batch.bands is not None:
        return jnp.asarray(batch.bands, jnp.float32)
    span = (typing.cast(float, config.rate_min), typing.cast(float, config.rate_max))
    return jnp.broadcast_to(jnp.array([span], jnp.float32), (batch.tokens.shape[0], 2))


def draw_rates(
    key: Key, batch: Batch, *, config: ObjectiveConfig, n_rows: int, draws: int = 1
) -> tuple[Float[Array, "B draws"], Float[Array, "B draws"]]:
    """Returns `draws` rates of each row in its band, and their density weights (`rates_in`).

    All is a function of (key, row, visit) alone, but for `rate_draw='stratified'`, where it is one of the rows of the
    batch.
    """
    units = draw_units(key, batch.row_ids, batch.visits, n_rows=n_rows, draws=draws, how=config.rate_draw)
    return rates_in(units, row_bands(batch, config), SCHEDULES[config.noise_schedule])


def rates_in(
    units: Float[Array, "B draws"], bands: Float[Array, "B 2"], schedule: Schedule
) -> tuple[Float[Array, "B draws"], Float[Array, "B draws"]]:
    """Maps units in (0, 1] to rates r in (low, high] of each row's band, and gives each draw's density weight.

    With t = t(low) + unit * (t(high) - t(low)) and r = g(t), the mean over units of weight * f(r) is the mean of f over
    rates uniform in the band: weight = g'(t) (t(high) - t(low)) / (high - low), which is 1 for the linear schedule. A
    band without width is one rate, of weight 1.
    """
    low, high = bands[:, :1], bands[:, 1:]
    start, end = schedule.time(low), schedule.time(high)
    times = start + units * (end - start)
    rates = jnp.minimum(jnp.maximum(schedule.rate(times), jnp.nextafter(low, jnp.ones_like(low))), high)
    is_level = high <= low
    stretch = jnp.where(is_level, 1.0, (end - start) / jnp.where(is_level, 1.0, high - low))
    return rates, jnp.where(is_level, 1.0, stretch * schedule.slope(times))


_rates_in = jax.jit(rates_in, static_argnums=2)


def mean_rate(config: ObjectiveConfig, band: tuple[float, float] | None) -> float:
    """The mean over draws of the masked fraction in a band; None: in the config's whole range."""
    low, high = band or (config.rate_min, config.rate_max)
    units = (np.arange(MEAN_DRAWS, dtype=np.float32) + np.float32(0.5))[None, :] / np.float32(MEAN_DRAWS)
    band_edges = np.array([[low, high]], np.float32)
    rates, _ = _rates_in(units, band_edges, SCHEDULES[config.noise_schedule])  # one program: plans are made at start
    return float(np.mean(np.asarray(rates)))


def draw_units(
    key: Key, row_ids: Int[AnyArray, "B"], variants: Int[AnyArray, "B"], *, n_rows: int, draws: int, how: str
) -> Float[Array, "B draws"]:
    """Numbers in (0, 1], uniform each, `draws` to a row.

    Args:
      how: low_discrepancy (even over rows, draws and variants), stratified (one in each cell of 1 / (B * draws), with
        one shared offset, whatever the order of the rows), or independent.
    """
    if how == "low_discrepancy":
        return low_discrepancy_units(key, row_ids, variants, n_rows=n_rows, draws=draws)
    if how == "stratified":
        return stratified_units(key, row_ids, variants, draws=draws)

    def draw(row: Array, variant: Array) -> Array:
        return 1.0 - jax.random.uniform(row_key(key, row, variant), (draws,))

    return jax.vmap(draw)(row_ids, variants)


def low_discrepancy_units(
    key: Key, row_ids: Int[AnyArray, "B"], variants: Int[AnyArray, "B"], *, n_rows: int, draws: int
) -> Float[Array, "B draws"]:
    """1 - frac(hash(key) + golden ratio * index), where the index counts variants, then rows, then draws.

    In 32-bit integers, so that no index is too large. A function of (key, row, variant) alone.
    """
    index = jnp.asarray(row_ids, jnp.uint32) + jnp.uint32(n_rows) * jnp.asarray(variants, jnp.uint32)
    index = index[:, None] * jnp.uint32(draws) + jnp.arange(draws, dtype=jnp.uint32)[None, :]
    start: UInt32[Array, ""] = jax.random.bits(key, dtype=jnp.uint32)
    sequence = start + jnp.uint32(_GOLDEN) * index
    # 24 bits fit a float32 exactly; 1 - u turns [0, 1) into (0, 1].
    return 1.0 - (sequence >> 8).astype(jnp.float32) / float(2**24)


def stratified_units(
    key: Key, row_ids: Int[AnyArray, "B"], variants: Int[AnyArray, "B"], *, draws: int
) -> Float[Array, "B draws"]:
    """frac(u + i / n) for the n = B * draws draws of a batch, with one u of the batch's rows and variants.

    u is a sum of bits over the rows, so their order does not matter to it. Its first digit in base n says which cell
    the first draw falls into, the rest where in each cell; the two are added exactly, so no draw leaves its cell.
    """
    n = row_ids.shape[0] * draws

    def bits_of(row: Array, variant: Array) -> Array:
        return jax.random.bits(row_key(key, row, variant), (2,), jnp.uint32)

    first, inside = jnp.sum(jax.vmap(bits_of)(row_ids, variants), axis=0, dtype=jnp.uint32)
    cells = (jnp.arange(n, dtype=jnp.uint32) + first % jnp.uint32(n)) % jnp.uint32(n)
    n_bits = max(22 - n.bit_length(), 0)
    offset = ((inside >> (31 - n_bits) >> 1).astype(jnp.float32) + 0.5) / 2.0**n_bits
    return ((cells.astype(jnp.float32) + offset) / n).reshape(-1, draws)
