"""Masks: the same row hides the same places whatever its batch, rates nest, and the stated weights are unbiased."""

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.objectives import masks

T = 16
SCORES = jax.jit(masks.uniform_scores, static_argnums=3)
BY_RATE, BY_COUNT = jax.jit(masks.hide_by_rate), jax.jit(masks.hide_by_count)


def scores_of(seed: int, rows: list[int], variants: list[int]) -> np.ndarray:
    return np.asarray(SCORES(jax.random.key(seed), jnp.array(rows), jnp.array(variants), T))


def test_scores_depend_on_row_and_variant_and_not_on_the_batch():
    one_by_one = [scores_of(3, [row], [variant])[0] for row, variant in [(5, 0), (9, 2), (5, 1)]]
    np.testing.assert_array_equal(scores_of(3, [5, 9, 5], [0, 2, 1]), one_by_one)
    np.testing.assert_array_equal(scores_of(3, [9, 5, 5], [2, 1, 0]), [one_by_one[1], one_by_one[2], one_by_one[0]])


def test_scores_differ_with_seed_row_variant_and_place():
    base = scores_of(3, [5], [0])
    for other in (scores_of(4, [5], [0]), scores_of(3, [6], [0]), scores_of(3, [5], [1]), scores_of(3, [0], [5])):
        assert not np.any(base == other)
    assert len(np.unique(base)) == T


def test_scores_are_uniform():
    drawn = np.sort(scores_of(0, list(range(256)), [0] * 256).ravel())
    assert 0.0 <= drawn[0] <= drawn[-1] < 1.0
    # Kolmogorov-Smirnov: P(distance > 1.95 / sqrt(n)) is about 1e-3.
    assert np.max(np.abs(drawn - (np.arange(drawn.size) + 0.5) / drawn.size)) < 1.95 / math.sqrt(drawn.size)


def hidden_at(form: Any, rate: float, scores: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    return np.asarray(form(jnp.array(scores), jnp.array(eligible), jnp.full(len(scores), rate, jnp.float32)))


def nests(lower: np.ndarray, upper: np.ndarray) -> bool:
    return not np.any(lower & ~upper)


RATES = st.floats(0.0, 1.0, width=32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), RATES, RATES, st.sampled_from([BY_RATE, BY_COUNT]))
def test_masks_nest_in_the_rate(row: int, one: float, other: float, form: Any):
    scores = scores_of(0, [row] * 4, [0, 1, 2, 3])
    eligible = scores_of(1, [row] * 4, [0, 1, 2, 3]) < 0.8
    low, high = hidden_at(form, min(one, other), scores, eligible), hidden_at(form, max(one, other), scores, eligible)
    assert nests(low, high)
    assert not np.any(high & ~eligible)


def test_masks_nest_in_the_rate_detects_fresh_scores_per_rate():
    eligible = np.ones((4, T), bool)
    low = hidden_at(BY_RATE, 0.4, scores_of(0, [1] * 4, [0, 1, 2, 3]), eligible)
    high = hidden_at(BY_RATE, 0.5, scores_of(1, [1] * 4, [0, 1, 2, 3]), eligible)
    assert not nests(low, high)


@pytest.mark.parametrize("form", [BY_RATE, BY_COUNT])
def test_the_ends_hide_nothing_eligible_wrongly(form: Any):
    scores = scores_of(0, [0, 1], [0, 0])
    nothing, everything = np.zeros((2, T), bool), np.ones((2, T), bool)
    assert hidden_at(form, 1.0, scores, everything).all()
    assert not hidden_at(form, 1.0, scores, nothing).any()
    assert hidden_at(BY_RATE, 0.0, scores, everything).sum() == 0
    assert (hidden_at(BY_COUNT, 0.0, scores, everything).sum(axis=1) == 1).all()


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_each_place_is_hidden_with_the_rate(rate: float):
    n = 4096
    scores = scores_of(7, list(range(n)), [0] * n)
    hidden = hidden_at(BY_RATE, rate, scores, np.ones((n, T), bool))
    deviation = math.sqrt(rate * (1 - rate) / n)
    assert np.all(np.abs(hidden.mean(axis=0) - rate) < 4.5 * deviation)
    # The count of a row is binomial: its variance tells independent places from dependent ones.
    assert np.var(hidden.sum(axis=1)) == pytest.approx(T * rate * (1 - rate), rel=0.15)
    counted = hidden_at(BY_COUNT, rate, scores, np.ones((n, T), bool))
    assert np.var(counted.sum(axis=1)) == 0.0  # the same check notices the count form


@pytest.mark.parametrize("percent", [1, 15, 30, 60, 90, 100])
def test_the_count_form_hides_exactly_the_ceiling(percent: int):
    lengths = np.arange(1, 513)
    eligible = np.arange(512)[None, :] < lengths[:, None]
    scores = np.random.default_rng(0).random((512, 512), np.float32)
    counts = hidden_at(BY_COUNT, percent / 100, scores, eligible).sum(axis=1)
    np.testing.assert_array_equal(counts, [math.ceil(Fraction(percent, 100) * n) for n in lengths.tolist()])


def test_the_count_form_hides_the_smallest_scores():
    scores = scores_of(0, [0, 1], [0, 0])
    eligible = scores_of(1, [0, 1], [0, 0]) < 0.7
    hidden = hidden_at(BY_COUNT, 0.4, scores, eligible)
    for row in range(2):
        assert scores[row][hidden[row]].max() < scores[row][eligible[row] & ~hidden[row]].min()


def test_counts_are_uniform_when_rates_are():
    n, per_count = 8, 64
    rates = (np.arange(n * per_count) + 1) / (n * per_count)  # the uniform law on (0, 1], equally spaced
    scores = np.random.default_rng(0).random((rates.size, n), np.float32)
    hidden = BY_COUNT(jnp.array(scores), jnp.ones((rates.size, n), bool), jnp.array(rates, jnp.float32))
    counts = np.bincount(np.asarray(hidden).sum(axis=1), minlength=n + 1)
    assert counts[0] == 0
    np.testing.assert_array_equal(counts[1:], per_count)


# Unbiasedness, exactly: the mean of a weighted sum over all outcomes against the plain sum of losses.
LOSSES = (Fraction(1), Fraction(5), Fraction(2), Fraction(11), Fraction(3))


def expected_of_count_form(count_of: Any, weight_of: Any, steps: int = 60) -> Fraction:
    """E over r uniform on (0, 1] (midpoints of `steps` cells) and over uniform subsets of count_of(r) of n places."""
    n = len(LOSSES)
    total = Fraction(0)
    for step in range(steps):
        rate = Fraction(2 * step + 1, 2 * steps)
        m = count_of(rate, n)
        subsets = list(itertools.combinations(LOSSES, m))
        mean = sum((sum(subset, Fraction(0)) for subset in subsets), Fraction(0)) / len(subsets)
        total += weight_of(rate, m, n) * mean
    return total / steps


def stated_count(rate: Fraction, n: int) -> int:
    """The library's own count for this rate and length."""
    scores = np.linspace(0.1, 0.9, n, dtype=np.float32)[None]
    return int(hidden_at(BY_COUNT, float(rate), scores, np.ones((1, n), bool)).sum())


def test_weight_n_over_m_is_unbiased_for_the_count_form():
    assert expected_of_count_form(stated_count, lambda rate, m, n: Fraction(n, m)) == sum(LOSSES)


@pytest.mark.parametrize(
    ("count_of", "weight_of"),
    [
        (stated_count, lambda rate, m, n: 1 / rate),
        (lambda rate, n: math.floor(rate * n), lambda rate, m, n: 1 / rate),
        (stated_count, lambda rate, m, n: Fraction(1)),
    ],
    ids=["ceiling with 1/r", "floor with 1/r", "no weight"],
)
def test_weight_n_over_m_is_unbiased_detects(count_of: Any, weight_of: Any):
    assert abs(expected_of_count_form(count_of, weight_of) - sum(LOSSES)) > sum(LOSSES) / 20


def exact_mean_by_rate(rate: Fraction, weight: Fraction) -> Fraction:
    """E of weight * (sum over M(r)), all masks of the five places enumerated with the library's own rule.

    Scores on a grid of `cells` midpoints are equally likely, so the mean over them is the integral where r is a
    multiple of 1 / cells; places are independent, so one place's share is enough for each.
    """
    cells = 20
    scores = (np.arange(cells, dtype=np.float32)[:, None] + np.float32(0.5)) / cells
    hidden = hidden_at(BY_RATE, float(rate), scores, np.ones((cells, 1), bool))
    share = Fraction(int(hidden.sum()), cells)
    total = Fraction(0)
    for mask in itertools.product([0, 1], repeat=len(LOSSES)):
        probability = functools.reduce(lambda p, bit: p * (share if bit else 1 - share), mask, Fraction(1))
        total += probability * weight * sum(bit * loss for bit, loss in zip(mask, LOSSES, strict=True))
    return total


@pytest.mark.parametrize("rate", [Fraction(3, 20), Fraction(1, 2), Fraction(1)])
def test_weight_one_over_r_is_unbiased_for_the_rate_form(rate: Fraction):
    assert exact_mean_by_rate(rate, 1 / rate) == sum(LOSSES)


def test_weight_one_over_r_is_unbiased_detects_a_missing_weight():
    assert exact_mean_by_rate(Fraction(1, 2), Fraction(1)) != sum(LOSSES)
