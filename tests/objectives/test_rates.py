"""Rates: even over rows and visits, a function of them alone, and stratified over a batch where that is asked for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.objectives.rates import SCHEDULES, draw_units, rates_in

INTS = st.integers(0, 2**31 - 1)
DRAW = jax.jit(draw_units, static_argnames=("n_rows", "draws", "how"))


def units_of(
    seed: int,
    rows: Any,
    variants: Any,
    *,
    draws: int = 1,
    how: str = "low_discrepancy",
    draw: Any = DRAW,
    n_rows: int = 128,
) -> np.ndarray:
    arrays = jnp.asarray(rows), jnp.asarray(variants)
    return np.asarray(draw(jax.random.key(seed), *arrays, n_rows=n_rows, draws=draws, how=how))


def star_discrepancy(points: np.ndarray) -> float:
    """Largest distance between the empirical distribution and the uniform one."""
    ordered, n = np.sort(points), len(points)
    above = np.arange(1, n + 1) / n - ordered
    return float(max(above.max(), (above * -1 + 1 / n).max()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_units_cover_the_interval_far_better_than_chance(seed: int):
    n_rows, n_variants = 128, 4
    rows, variants = np.tile(np.arange(n_rows), n_variants), np.repeat(np.arange(n_variants), n_rows)
    points = units_of(seed, rows, variants)[:, 0]
    chance = star_discrepancy(np.random.default_rng(seed).random(points.size))
    # The additive golden sequence has discrepancy of order log n / n; chance is of order 1 / sqrt n.
    assert star_discrepancy(points) < 2 * math.log(points.size) / points.size < chance
    one_variant = points[:n_rows]
    assert star_discrepancy(one_variant) < 2 * math.log(n_rows) / n_rows


def test_units_cover_the_interval_detects_variants_that_repeat():
    rows, variants = np.tile(np.arange(128), 4), np.zeros(512, np.int32)
    points = units_of(0, rows, variants)[:, 0]
    fresh = units_of(0, rows, np.repeat(np.arange(4), 128))[:, 0]
    assert star_discrepancy(points) > 2 * star_discrepancy(fresh)


def test_draws_of_a_row_and_of_all_rows_are_even():
    """The blocks of one row, and those of all rows, cover the interval far better than chance."""
    points = units_of(0, np.arange(64), np.zeros(64, int), draws=32)
    assert star_discrepancy(points.ravel()) < 2 * math.log(points.size) / points.size
    assert max(star_discrepancy(row) for row in points) < 2 * math.log(32) / 32
    chance = units_of(0, np.arange(64), np.zeros(64, int), draws=32, how="independent")
    assert max(star_discrepancy(row) for row in chance) > 2 * math.log(32) / 32


@pytest.mark.parametrize("how", ["low_discrepancy", "independent"])
def test_units_depend_on_row_and_variant_alone(how: str):
    together = units_of(0, [3, 4, 3], [0, 0, 1], draws=2, how=how)
    alone = [units_of(0, [row], [variant], draws=2, how=how)[0] for row, variant in [(3, 0), (4, 0), (3, 1)]]
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together)) == together.size


def test_units_depend_on_row_and_variant_alone_detects_stratified_ones():
    together = units_of(0, [3, 4, 3], [0, 0, 1], how="stratified")
    assert not np.array_equal(together[:1], units_of(0, [3], [0], how="stratified"))


@settings(max_examples=25, deadline=None)
@given(INTS, st.integers(0, 2**20), st.integers(1, 2**31 - 1))
def test_units_lie_in_the_half_open_interval(row: int, variant: int, n_rows: int):
    for how in ("low_discrepancy", "independent", "stratified"):
        unit = units_of(0, [row], [variant], how=how, draw=draw_units, n_rows=n_rows)[0, 0]
        assert 0.0 < unit <= 1.0


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (7, 1), (16, 3), (1000, 1), (256, 33)])
def test_stratified_units_take_every_cell_once(n: int, draws: int):
    units = units_of(0, np.arange(n), np.zeros(n, int), draws=draws, how="stratified").ravel()
    cells = np.ceil(units.astype(np.float64) * units.size)
    np.testing.assert_array_equal(np.sort(cells), np.arange(1, units.size + 1))
    np.testing.assert_allclose(np.diff(np.sort(units)), 1.0 / units.size, atol=1e-6)  # one offset for all


def test_the_offset_of_a_stratified_batch_is_uniform_and_not_a_matter_of_order():
    offsets = np.array([units_of(seed, [5, 9, 2, 7], [0, 1, 0, 3], how="stratified").min() for seed in range(200)]) * 4
    # Kolmogorov-Smirnov: P(distance > 1.95 / sqrt(n)) is about 1e-3.
    assert star_discrepancy(offsets) < 1.95 / math.sqrt(offsets.size)
    first = np.array([units_of(seed, [5, 9, 2, 7], [0, 1, 0, 3], how="stratified")[0, 0] for seed in range(200)])
    assert star_discrepancy(first) < 1.95 / math.sqrt(first.size)  # the first row has no cell of its own
    turned = units_of(3, [7, 2, 9, 5], [3, 0, 1, 0], how="stratified")
    np.testing.assert_array_equal(turned, units_of(3, [5, 9, 2, 7], [0, 1, 0, 3], how="stratified"))


def test_a_band_without_width_is_its_rate_with_weight_one():
    for schedule in SCHEDULES.values():
        rates, density = rates_in(jnp.linspace(0.1, 1.0, 8)[None], jnp.array([[0.15, 0.15]]), schedule)
        np.testing.assert_array_equal(rates, np.full((1, 8), 0.15, np.float32))
        np.testing.assert_array_equal(density, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rounding_leaves_no_band(schedule: str):
    """The smallest and the largest unit, in bands whose ends they round to and beyond."""
    lows = np.linspace(0.01, 0.99, 400, dtype=np.float32)
    bands = jnp.array(np.stack([lows, np.minimum(lows + np.float32(0.3), 1.0)], axis=1))
    units = jnp.full((400, 2), jnp.array([2.0**-24, 1.0]))
    rates, _ = rates_in(units, bands, SCHEDULES[schedule])
    assert np.all((rates > bands[:, :1]) & (rates <= bands[:, 1:]))
    assert not np.all(bands[:, :1] + units * 0.3 > bands[:, :1])  # as plain arithmetic has it


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("band", [(0.0, 1.0), (1e-3, 0.25), (0.9, 1.0)])
def test_a_schedule_spreads_times_evenly_over_the_band(schedule: str, band: tuple[float, float]):
    """Rates at even units have even times; the linear one's are even themselves."""
    units = jnp.linspace(0.01, 1.0, 64)[None]
    rates, _ = rates_in(units, jnp.array([band], jnp.float32), SCHEDULES[schedule])
    times = {"linear": lambda r: r, "cosine": lambda r: 1.0 - 2.0 / np.pi * np.arccos(r), "polynomial": np.sqrt}
    np.testing.assert_allclose(np.diff(times[schedule](np.asarray(rates[0], np.float64)), n=2), 0.0, atol=2e-4)
    assert (np.ptp(np.diff(rates[0])) < 1e-5) == (schedule == "linear")
