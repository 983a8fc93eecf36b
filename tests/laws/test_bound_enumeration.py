"""Band losses sum to the bound, and the bound is the mean over orders: exactly, with every mask enumerated.

First the statement itself in float64 numpy, on the package's own bands; then the package's own rates and weights, at
the nodes of a quadrature.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.objectives import masks
from stackwise_jax.objectives.bands import band_edges
from stackwise_jax.objectives.rates import SCHEDULES, Schedule, rates_in
from tests.laws.table_model import (
    MASK,
    ROW,
    SUBSETS,
    T,
    integral,
    integral_by_count,
    masked_losses,
    mean_over_orders,
    nats,
)

LOSSES = masked_losses()
WHOLE = integral(LOSSES, 0.0, 1.0)
ORDERS = ("high_to_low", "low_to_high")
Bands = tuple[tuple[float, float], ...]


def sum_of_bands(bands: Bands, *, power: int = -1, with_width: bool = True) -> float:
    """The bands' means, each times its width."""
    means = [integral(LOSSES, low, high, power=power) / (high - low) for low, high in bands]
    return sum((high - low if with_width else 1.0) * mean for mean, (low, high) in zip(means, bands, strict=True))


def test_the_bound_is_the_mean_over_all_orders():
    assert mean_over_orders() == pytest.approx(WHOLE, rel=1e-12)
    assert integral_by_count(LOSSES, 0.0, 1.0) == pytest.approx(WHOLE, rel=1e-12)


def test_the_bound_is_the_mean_over_all_orders_detects_weight_one():
    assert integral(LOSSES, 0.0, 1.0, power=0) != pytest.approx(mean_over_orders(), rel=0.05)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_bands", [1, 3, 4, 8])
def test_bands_sum_to_the_whole(n_bands: int, order: str):
    bands = band_edges(n_bands, 0.0, 1.0, order)
    assert sum_of_bands(bands) == pytest.approx(WHOLE, rel=1e-12)
    by_count = sum(integral_by_count(LOSSES, low, high) for low, high in bands)
    assert by_count == pytest.approx(WHOLE, rel=1e-12)


def shifted(bands: Bands) -> Bands:
    """One band begins too high, so that rates are missing."""
    (low, high), *rest = bands
    return ((low + 0.05, high), *rest)


@pytest.mark.parametrize(
    "broken",
    [
        lambda bands: sum_of_bands(bands, power=0),
        lambda bands: sum_of_bands(bands, with_width=False),
        lambda bands: sum_of_bands(shifted(bands)),
    ],
    ids=["weight 1", "width left out", "edge shifted"],
)
def test_bands_sum_to_the_whole_detects(broken: Callable[[Bands], float]):
    assert broken(band_edges(4, 0.0, 1.0, "high_to_low")) != pytest.approx(WHOLE, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0.0, 0.4), st.floats(0.5, 1.0), st.sampled_from(ORDERS))
def test_edges_are_contiguous_equal_and_exact_at_the_ends(n_bands: int, low: float, high: float, order: str):
    bands = band_edges(n_bands, low, high, order)
    heaviest_first = bands if order == "high_to_low" else bands[::-1]
    assert len(bands) == n_bands
    assert (heaviest_first[0][1], heaviest_first[-1][0]) == (high, low)
    assert all(upper[0] == lower[1] for upper, lower in itertools.pairwise(heaviest_first))
    np.testing.assert_allclose([top - bottom for bottom, top in bands], (high - low) / n_bands, rtol=1e-9)


# --- the package's rates, masks and weights in place of the integrals ---

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(24)
MASKED_NATS = nats(np.where(SUBSETS, MASK, ROW), ROW[None].repeat(len(SUBSETS), 0))
EVERY = jnp.ones((len(SUBSETS) * len(NODES), T), bool)
WEIGHTS = jax.jit(masks.bound_weights, static_argnames="form")


def band_mean(band: tuple[float, float], schedule: Schedule, *, density: bool = True, weigh: bool = True) -> float:
    """E over the schedule's time, uniform in the band, of E over all 64 masks of the package's weighted sum."""
    units = jnp.array((NODES + 1.0) / 2.0, jnp.float32)[None]
    rates, densities = rates_in(units, jnp.array([band], jnp.float32), schedule)
    densities = densities if density else jnp.ones_like(densities)
    hidden = np.tile(SUBSETS, (len(NODES), 1))
    each = jnp.repeat(rates[0], len(SUBSETS)), jnp.repeat(densities[0], len(SUBSETS))
    weights = np.asarray(WEIGHTS(jnp.array(hidden), EVERY, *each, form="bernoulli"), np.float64)
    weights = weights if weigh else hidden
    sums = (weights * np.tile(MASKED_NATS, (len(NODES), 1))).sum(axis=1).reshape(len(NODES), -1)
    r, m = np.asarray(rates, np.float64).T, SUBSETS.sum(axis=1)[None]
    means = (r**m * (1.0 - r) ** (T - m) * sums).sum(axis=1)
    return float((means * NODE_WEIGHTS / 2.0).sum())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same_bound(schedule: str):
    """The bound in a time t with survival alpha(t) is the bound in r, for each band and for the whole."""
    bands = band_edges(4, 1e-3, 1.0, "high_to_low")
    means = [band_mean(band, SCHEDULES[schedule]) for band in bands]
    exact = [integral(LOSSES, low, high) / (high - low) for low, high in bands]
    np.testing.assert_allclose(means, exact, rtol=5e-5)
    whole = sum((high - low) * mean for mean, (low, high) in zip(means, bands, strict=True))
    assert whole == pytest.approx(integral(LOSSES, 1e-3, 1.0), rel=5e-5)
    assert whole == pytest.approx(WHOLE, rel=2e-3)  # what the floor leaves out


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("cosine", {"density": False}), ("polynomial", {"density": False}), ("linear", {"weigh": False})],
)
def test_every_schedule_gives_the_same_bound_detects(schedule: str, options: dict[str, bool]):
    bands = band_edges(4, 1e-3, 1.0, "high_to_low")
    means = [band_mean(band, SCHEDULES[schedule], **options) for band in bands]
    exact = [integral(LOSSES, low, high) / (high - low) for low, high in bands]
    assert not np.allclose(means, exact, rtol=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_density_weight_is_minus_alpha_prime_over_masked(schedule: str):
    """Against a derivative of the published alpha(t), by differences in float64."""
    alpha = {
        "linear": lambda t: 1.0 - t,
        "cosine": lambda t: 1.0 - np.cos(np.pi / 2.0 * (1.0 - t)),
        "polynomial": lambda t: 1.0 - t**2,
    }[schedule]
    times = np.linspace(0.05, 0.95, 19)
    slope = (alpha(times + 1e-6) - alpha(times - 1e-6)) / 2e-6
    rates, density = rates_in(jnp.array(times, jnp.float32)[None], jnp.array([[0.0, 1.0]]), SCHEDULES[schedule])
    np.testing.assert_allclose(rates[0], 1.0 - alpha(times), rtol=1e-5)
    np.testing.assert_allclose(density[0] / rates[0], -slope / (1.0 - alpha(times)), rtol=1e-4)


def sum_of_counted_bands(n_bands: int, *, form: str = "count") -> float:
    """The package's count form over all 720 orders of scores and the midpoints of 60 cells of r, band by band."""
    scores = np.array(list(itertools.permutations(range(T))), np.float32) / T
    total = 0.0
    for band in band_edges(n_bands, 0.0, 1.0, "high_to_low"):
        n = 60 // n_bands
        units = jnp.array((np.arange(n) + 0.5) / n, jnp.float32)[None]
        rates, density = rates_in(units, jnp.array([band], jnp.float32), SCHEDULES["linear"])
        rows = jnp.array(np.tile(scores, (n, 1)))
        each = jnp.repeat(rates[0], len(scores)), jnp.repeat(density[0], len(scores))
        eligible = jnp.ones_like(rows, bool)
        hidden = masks.hide(rows, eligible, each[0], form="count")
        weights = np.asarray(WEIGHTS(hidden, eligible, *each, form=form), np.float64)
        places = np.asarray(hidden)
        loss = weights * nats(np.where(places, MASK, ROW), ROW[None].repeat(len(places), 0))
        total += (band[1] - band[0]) * float(loss.sum(axis=1).mean())
    return total


@pytest.mark.parametrize("n_bands", [1, 4])
def test_the_count_form_gives_the_same_bound(n_bands: int):
    assert sum_of_counted_bands(n_bands) == pytest.approx(WHOLE, rel=1e-5)


def test_the_count_form_gives_the_same_bound_detects_weight_one_over_r():
    assert sum_of_counted_bands(1, form="bernoulli") != pytest.approx(WHOLE, rel=0.02)
