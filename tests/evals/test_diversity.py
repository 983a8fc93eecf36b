"""Distinct n-grams and entropy of samples, by hand."""

import math

import numpy as np

from stackwise_jax.evals.diversity import distinct, token_entropy


def test_figures_of_small_samples():
    samples = [(np.array([1, 2, 1, 2]),), (np.array([1, 2]), np.array([3]))]
    assert distinct(samples) == 2 / 4  # 12, 21, 12 and 12; nothing spans two runs
    assert distinct(samples, 1) == 3 / 7
    assert math.isclose(token_entropy(samples), (math.log(2) + math.log(3)) / 2)


def test_figures_of_nothing():
    assert math.isnan(distinct([(np.array([1]),)]))
    assert math.isnan(token_entropy([()]))
    assert token_entropy([(np.array([4, 4, 4]),), ()]) == 0.0
