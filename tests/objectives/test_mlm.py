"""Masked language modelling: what is hidden, what is shown instead, and that only hidden places are asked."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.objectives.objective import Task, make_corrupt
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Vocabulary

VOCABULARY = Vocabulary(size=64, mask_id=4, special_ids=(0, 1, 2, 3, 4, 5, 6))
MLM = ObjectiveConfig(name="mlm", rate_min=0.5, rate_max=0.5)
TASK = Task("mlm", "bidirectional")
B, T = 256, 32


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Rows of ordinary and some special tokens, the last six places padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(7, 64, (B, T))
    tokens[rng.random((B, T)) < 0.1] = 2
    segments = np.where(np.arange(T) < T - 6, 1, 0)[None].repeat(B, 0)
    arrays = (np.where(segments, tokens, 0), segments, np.arange(T)[None].repeat(B, 0), np.arange(B), np.zeros(B))
    return Batch(*(jnp.array(array, jnp.int32) for array in arrays))


def corrupt(config: ObjectiveConfig, batch: Batch, seed: int = 0) -> Example:
    return jax.jit(make_corrupt(config, TASK, VOCABULARY, n_rows=B))(jax.random.key(seed), batch)


@pytest.fixture(scope="module")
def example(batch: Batch) -> Example:
    return corrupt(MLM, batch)


def eligible(batch: Batch) -> np.ndarray:
    return (np.asarray(batch.segments) > 0) & ~np.isin(batch.tokens, VOCABULARY.special_ids)


def leaves_alone(example: Example, batch: Batch) -> bool:
    """Special tokens and padding are shown as they are and never asked."""
    untouched = ~eligible(batch)
    same = np.asarray(example.inputs)[untouched] == np.asarray(batch.tokens)[untouched]
    return bool(same.all() and not np.asarray(example.weights)[untouched].any())


@pytest.mark.parametrize("form", ["bernoulli", "count"])
@pytest.mark.parametrize("replacement", ["bert", "mask"])
def test_special_tokens_and_padding_are_never_hidden(batch: Batch, form: str, replacement: str):
    config = dataclasses.replace(MLM, mask_form=form, replacement=replacement, rate_min=0.9, rate_max=1.0)
    assert leaves_alone(corrupt(config, batch), batch)


def test_special_tokens_and_padding_are_never_hidden_detects_a_vocabulary_without_specials(batch: Batch):
    careless = dataclasses.replace(VOCABULARY, special_ids=(0,))
    corrupted = make_corrupt(MLM, TASK, careless, n_rows=B)(jax.random.key(0), batch)
    assert not leaves_alone(corrupted, batch)


def test_hidden_places_ask_for_themselves_and_others_for_nothing(batch: Batch, example: Example):
    np.testing.assert_array_equal(example.targets, batch.tokens)
    changed = np.asarray(example.inputs) != np.asarray(batch.tokens)
    assert set(np.unique(example.weights)) == {0.0, 1.0}
    assert np.all(np.asarray(example.weights)[changed] == 1.0)


def close_to(count: int, n: int, share: float) -> bool:
    """Within 4.5 standard deviations of a binomial count."""
    return abs(count - n * share) < 4.5 * math.sqrt(n * share * (1 - share))


def test_replacements_are_80_10_10(batch: Batch, example: Example):
    hidden = np.asarray(example.weights) == 1.0
    shown, original = np.asarray(example.inputs)[hidden], np.asarray(batch.tokens)[hidden]
    n, ordinary = hidden.sum(), VOCABULARY.size - 7
    assert close_to(n, eligible(batch).sum(), 0.5)
    assert close_to((shown == VOCABULARY.mask_id).sum(), n, 0.8)
    # A random token is the original one time in `ordinary`.
    assert close_to((shown == original).sum(), n, 0.1 + 0.1 / ordinary)
    replaced = shown[(shown != VOCABULARY.mask_id) & (shown != original)]
    assert close_to(replaced.size, n, 0.1 * (1 - 1 / ordinary))
    assert replaced.min() > max(VOCABULARY.special_ids)
    assert replaced.max() < VOCABULARY.size
    assert len(np.unique(replaced)) > ordinary * 0.8


def test_replacements_are_80_10_10_detects_always_the_mask(batch: Batch):
    plain = corrupt(dataclasses.replace(MLM, replacement="mask"), batch)
    hidden = np.asarray(plain.weights) == 1.0
    assert not close_to((np.asarray(plain.inputs)[hidden] == VOCABULARY.mask_id).sum(), hidden.sum(), 0.8)


def test_what_is_shown_does_not_decide_what_is_hidden(batch: Batch, example: Example):
    """Scores and replacements are independent streams: both replacements hide the same places."""
    plain = corrupt(dataclasses.replace(MLM, replacement="mask"), batch)
    np.testing.assert_array_equal(plain.weights, example.weights)
    hidden = np.asarray(example.weights) == 1.0
    first, second = hidden[:, :16], np.asarray(example.inputs == VOCABULARY.mask_id)[:, :16]
    assert close_to((first & second).sum(), first.sum(), 0.8)


def test_a_row_is_corrupted_alike_in_every_batch(batch: Batch, example: Example):
    order = np.array([40, 7, 199])
    picked = jax.tree.map(lambda leaf: leaf[order], batch)
    again = corrupt(MLM, picked)
    np.testing.assert_array_equal(again.inputs, np.asarray(example.inputs)[order])
    np.testing.assert_array_equal(again.weights, np.asarray(example.weights)[order])


def test_another_visit_or_seed_is_another_corruption(batch: Batch, example: Example):
    later = corrupt(MLM, dataclasses.replace(batch, visits=batch.visits + 1))
    assert not np.array_equal(later.weights, example.weights)
    assert not np.array_equal(corrupt(MLM, batch, seed=1).weights, example.weights)


def test_counts_follow_the_rates_of_a_range(batch: Batch):
    config = dataclasses.replace(MLM, mask_form="count", rate_min=0.1, rate_max=0.9)
    n_hidden = np.asarray(corrupt(config, batch).weights).sum(axis=1)
    shares = n_hidden / eligible(batch).sum(axis=1)
    assert shares.min() > 0.1
    assert shares.max() < 0.9 + 1 / 10  # the ceiling of a count of at least ten
    assert np.mean(shares) == pytest.approx(0.5 + 0.5 / 23.4, abs=0.01)  # rates evenly spread, plus half a place
