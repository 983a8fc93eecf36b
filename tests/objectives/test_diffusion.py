"""Masked diffusion: what is masked, weighed, divided by, revealed; a shifted head; blocks with rates of their own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.objectives.objective import Task, make_corrupt
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Vocabulary

VOCABULARY = Vocabulary(size=64, mask_id=4, special_ids=(0, 1, 2, 3, 4))
B, T, BLOCK = 256, 24, 5
TASKS = {name: Task(name, "bidirectional") for name in ("mlm", "diffusion", "block_diffusion")}


def make_batch() -> Batch:
    """Rows of two documents of ordinary and a few special tokens, the last four places padding."""
    rng, place = np.random.default_rng(0), np.arange(T)[None].repeat(B, 0)
    segments = np.where(place < 11, 1, np.where(place < 20, 2, 0))
    tokens = np.where(rng.random((B, T)) < 0.1, 2, rng.integers(5, 64, (B, T)))
    arrays = (tokens * (segments > 0), segments, place, np.arange(B), np.zeros(B))
    return Batch(*(jnp.array(array, jnp.int32) for array in arrays))


BATCH = make_batch()
SEGMENTS, TOKENS = np.asarray(BATCH.segments), np.asarray(BATCH.tokens)
ORDINARY = (SEGMENTS > 0) & (TOKENS > 4)
# With a shifted head the first places of both documents cannot be asked.
SHIFTABLE = ORDINARY & ~np.isin(np.arange(T), [0, 11])


@functools.cache
def example_of(name: str, band: tuple[float, float] | None = None, **fields: Any) -> Example:
    config = ObjectiveConfig(
        **({"name": name, "rate_min": 0.3, "rate_max": 0.8, "replacement": "mask", "block_length": BLOCK} | fields)
    )
    bands = None if band is None else jnp.full((B, 2), jnp.array(band))
    corrupt = jax.jit(make_corrupt(config, TASKS[name], VOCABULARY, n_rows=B))
    return jax.tree.map(np.asarray, corrupt(jax.random.key(0), dataclasses.replace(BATCH, bands=bands)))


def masked(example: Example) -> np.ndarray:
    return np.asarray(example.inputs)[:, :T] == VOCABULARY.mask_id


def asks_for_the_masked(example: Example) -> bool:
    """Weight where the mask is and nowhere else; everything else shown as it is; each place its own target."""
    hidden, shown = masked(example), np.asarray(example.inputs)
    kept = np.array_equal(shown[~hidden], TOKENS[~hidden]) and np.array_equal(example.targets, TOKENS)
    return bool(kept and np.array_equal(example.weights > 0.0, hidden))


@pytest.mark.parametrize("form", ["bernoulli", "count"])
def test_masked_places_are_asked_for_and_no_others(form: str):
    example = example_of("diffusion", mask_form=form)
    assert asks_for_the_masked(example)
    assert not np.any(masked(example) & ~ORDINARY)
    np.testing.assert_array_equal(example.asked, ORDINARY.sum(axis=1))
    moved = dataclasses.replace(example, weights=np.roll(example.weights, 1, axis=1))
    assert not asks_for_the_masked(moved)


def test_weights_are_one_over_the_rate_or_n_over_m():
    by_rate, by_count = example_of("diffusion"), example_of("diffusion", mask_form="count")
    rows, _ = np.nonzero(masked(by_rate))
    np.testing.assert_allclose(by_rate.weights[masked(by_rate)], 1.0 / by_rate.rates[rows], rtol=1e-6)
    rows, _ = np.nonzero(masked(by_count))
    n_over_m = ORDINARY.sum(axis=1) / masked(by_count).sum(axis=1)
    np.testing.assert_allclose(by_count.weights[masked(by_count)], n_over_m[rows], rtol=1e-6)
    assert not np.allclose(by_count.weights[masked(by_count)], 1.0 / by_count.rates[rows], rtol=1e-2)


@pytest.mark.parametrize("name", ["diffusion", "block_diffusion"])
@pytest.mark.parametrize("fields", [{"weighting": "uniform"}, {"levels": "linear"}], ids=str)
def test_what_is_no_bound_is_a_mean_over_masked_places(name: str, fields: dict[str, str]):
    example = example_of(name, **fields)
    np.testing.assert_array_equal(example.weights[:, :T], masked(example))
    assert example.asked is None
    assert example.weight == masked(example).sum()
    assert example_of(name).weight == ORDINARY.sum()  # of a bound: all that could be masked


@pytest.mark.parametrize("name", ["diffusion", "block_diffusion"])
def test_large_weights_are_clipped_where_asked(name: str):
    free, clipped = example_of(name), example_of(name, max_weight=1.5)
    assert free.weights.max() > 1.5
    np.testing.assert_allclose(clipped.weights, np.minimum(free.weights, 1.5))
    np.testing.assert_array_equal(clipped.asked, free.asked)


@pytest.mark.parametrize("name", ["mlm", "diffusion"])
def test_a_level_is_its_rate_for_every_row(name: str):
    example = example_of(name, (0.25, 0.25), mask_form="count")
    np.testing.assert_array_equal(example.rates, np.float32(0.25))
    np.testing.assert_array_equal(masked(example).sum(axis=1), np.ceil(ORDINARY.sum(axis=1) / 4))


@pytest.mark.parametrize("name", TASKS)
def test_bands_of_a_batch_replace_the_range_of_the_config(name: str):
    light, heavy, whole = (example_of(name, band) for band in ((0.1, 0.2), (0.9, 1.0), None))
    shares = [masked(example).sum() / ORDINARY.sum() for example in (light, whole, heavy)]
    np.testing.assert_allclose(shares, [0.15, 0.55, 0.95], atol=0.03)
    same = example_of(name, (0.3, 0.8))
    np.testing.assert_array_equal(same.inputs, whole.inputs)


@pytest.mark.parametrize("name", ["mlm", "diffusion"])
def test_a_shifted_head_is_asked_one_place_before(name: str):
    plain, shifted = example_of(name), example_of(name, shift=True)
    hidden = masked(shifted)
    assert not np.any(hidden & ~SHIFTABLE)
    np.testing.assert_array_equal(hidden, masked(plain) & SHIFTABLE)  # the same scores
    np.testing.assert_array_equal(shifted.weights[:, :-1] > 0.0, hidden[:, 1:])
    assert not shifted.weights[:, -1].any()
    np.testing.assert_array_equal(shifted.targets[:, :-1], TOKENS[:, 1:])
    asked = np.nonzero(shifted.weights)
    np.testing.assert_array_equal(SEGMENTS[asked], SEGMENTS[asked[0], asked[1] + 1])
    if name == "diffusion":
        np.testing.assert_array_equal(shifted.asked, SHIFTABLE.sum(axis=1))


@pytest.mark.parametrize("form", ["bernoulli", "count"])
def test_revealed_places_are_visible_at_the_lower_edge(form: str):
    """Against the masks of the level at that edge: what is masked there is not revealed, all else is."""
    example = example_of("diffusion", (0.5, 0.9), consistency=1.0, mask_form=form)
    at_edge = masked(example_of("diffusion", (0.5, 0.5), mask_form=form))
    np.testing.assert_array_equal(example.revealed, (SEGMENTS > 0) & ~at_edge)
    assert np.any(example.revealed & masked(example))  # what the next band sees and this one does not
    assert not np.array_equal(example.revealed, (SEGMENTS > 0) & ~masked(example))
    assert example_of("diffusion", (0.5, 0.9), mask_form=form).revealed is None


def test_every_masked_row_tells_its_rate():
    for name in ("mlm", "diffusion"):
        shares = masked(example_of(name)).sum(axis=1) / ORDINARY.sum(axis=1)
        assert np.corrcoef(shares, example_of(name).rates)[0, 1] > 0.6
    assert example_of("mlm").asked is None


# --- blocks ---


def block_counts(values: np.ndarray) -> np.ndarray:
    """Sums over blocks of BLOCK places, the last one shorter."""
    return np.add.reduceat(values, np.arange(0, T, BLOCK), axis=1)


def test_a_row_of_blocks_is_its_noised_and_its_clean_half():
    example = example_of("block_diffusion")
    hidden = masked(example)
    np.testing.assert_array_equal(example.inputs[:, T:], TOKENS)
    np.testing.assert_array_equal(example.inputs[:, :T], np.where(hidden, VOCABULARY.mask_id, TOKENS))
    for half in (slice(0, T), slice(T, None)):
        np.testing.assert_array_equal(example.targets[:, half], TOKENS)
        np.testing.assert_array_equal(example.segments[:, half], SEGMENTS)
        np.testing.assert_array_equal(example.positions[:, half], BATCH.positions)
    np.testing.assert_array_equal(example.weights[:, :T] > 0.0, hidden)
    assert not example.weights[:, T:].any()
    assert not np.any(hidden & ~ORDINARY)
    assert example.rates is None


def test_every_block_has_a_rate_of_its_own():
    """Under the count form a block's rate can be read off its places: m of n, all of weight n/m."""
    example = example_of("block_diffusion", mask_form="count")
    n, m = block_counts(ORDINARY.astype(int)), block_counts(masked(example).astype(int))
    assert np.all((m >= 1) == (n >= 1))
    np.testing.assert_allclose(block_counts(example.weights[:, :T]), n, rtol=1e-5)
    assert np.mean(np.ptp((m / np.maximum(n, 1))[:, :4], axis=1) > 0.15) > 0.9  # rates differ inside a row
    one_rate = example_of("block_diffusion", (0.5, 0.5), mask_form="count")
    shares = block_counts(masked(one_rate).astype(int))
    np.testing.assert_array_equal(shares, np.ceil(n / 2))


def test_a_block_as_long_as_the_row_is_masked_diffusion():
    whole, plain = example_of("block_diffusion", block_length=T), example_of("diffusion")
    np.testing.assert_array_equal(whole.inputs[:, :T], plain.inputs)
    np.testing.assert_array_equal(whole.weights[:, :T], plain.weights)
    assert not np.array_equal(example_of("block_diffusion").inputs[:, :T], plain.inputs)


def test_a_shifted_head_reads_the_first_place_of_a_block_in_the_clean_half():
    example = example_of("block_diffusion", shift=True)
    hidden = masked(example)
    assert not np.any(hidden & ~SHIFTABLE)
    begins = np.arange(T) % BLOCK == 0
    np.testing.assert_array_equal(example.weights[:, : T - 1] > 0.0, (hidden & ~begins)[:, 1:])
    np.testing.assert_array_equal(example.weights[:, T:-1] > 0.0, (hidden & begins)[:, 1:])
    assert (hidden & begins).any()
    for half in (0, T):
        np.testing.assert_array_equal(example.targets[:, half : half + T - 1], TOKENS[:, 1:])
