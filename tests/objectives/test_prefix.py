"""Prefix language modelling: lengths are uniform and the row's own, and nothing inside a prefix is asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.objectives import clm
from stackwise_jax.objectives.objective import Task, make_corrupt
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Vocabulary

B, T = 2048, 20


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Rows of two documents and padding."""
    place = np.arange(T)[None].repeat(B, 0)
    segments = np.where(place < 9, 1, np.where(place < 17, 2, 0))
    tokens = np.random.default_rng(0).integers(5, 64, (B, T)) * (segments > 0)
    return Batch(*(jnp.array(a, jnp.int32) for a in (tokens, segments, place, np.arange(B), np.zeros(B))))


def corrupt(batch: Batch, share: float = 0.5, seed: int = 0) -> Example:
    config = ObjectiveConfig(name="prefix", prefix_share=share)
    own = jax.jit(make_corrupt(config, Task("prefix", "prefix"), Vocabulary(64, 4, (0, 1, 2, 3, 4)), n_rows=B))
    return jax.tree.map(np.asarray, own(jax.random.key(seed), batch))


@pytest.fixture(scope="module")
def example(batch: Batch) -> Example:
    return corrupt(batch)


def asks_after_the_prefix_alone(example: Example, batch: Batch) -> bool:
    """The first place asked for is the one right after the prefix; from there on all that a causal model is asked."""
    assert example.prefix_lengths is not None
    causal = np.asarray(clm.corrupt(jax.random.key(0), batch).weights)
    after = np.arange(T)[None] + 1 >= example.prefix_lengths[:, None]  # the place that is predicted
    return np.array_equal(example.weights, causal * after)


def test_only_what_follows_the_prefix_is_asked(batch: Batch, example: Example):
    assert asks_after_the_prefix_alone(example, batch)
    np.testing.assert_array_equal(example.inputs, batch.tokens)
    longer = dataclasses.replace(example, prefix_lengths=example.prefix_lengths + 1)
    assert not asks_after_the_prefix_alone(longer, batch)
    assert not asks_after_the_prefix_alone(clm_with(example, batch), batch)


def clm_with(example: Example, batch: Batch) -> Example:
    return dataclasses.replace(clm.corrupt(jax.random.key(0), batch), prefix_lengths=example.prefix_lengths)


@pytest.mark.parametrize(("share", "longest"), [(0.5, 10), (0.29, 5), (0.35, 7), (0.0, 0), (1.0, 20)])
def test_lengths_are_uniform_up_to_their_share(batch: Batch, share: float, longest: int):
    counts = np.bincount(corrupt(batch, share).prefix_lengths, minlength=longest + 1)
    assert len(counts) == longest + 1
    expected = B / (longest + 1)
    # Chi-square: its mean is `longest`, its variance twice that.
    assert np.sum((counts - expected) ** 2 / expected) < longest + 4.5 * np.sqrt(2 * longest) + 1


def test_lengths_are_a_function_of_seed_row_and_visit(batch: Batch, example: Example):
    picked = corrupt(jax.tree.map(lambda leaf: leaf[np.array([40, 7])], batch))
    np.testing.assert_array_equal(picked.prefix_lengths, example.prefix_lengths[[40, 7]])
    later = corrupt(dataclasses.replace(batch, visits=batch.visits + 1))
    for other in (later, corrupt(batch, seed=1)):
        assert abs(np.corrcoef(other.prefix_lengths, example.prefix_lengths)[0, 1]) < 4.5 / np.sqrt(B)
