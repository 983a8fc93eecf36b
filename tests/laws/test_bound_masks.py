"""Masks of one row nest from band to band, its rates lie in its band, and its weights sum to its places on average."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.objectives.bands import band_edges
from stackwise_jax.objectives.objective import Corrupt, Task, make_corrupt
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Vocabulary

VOCABULARY = Vocabulary(size=64, mask_id=4, special_ids=(0, 1, 2, 3, 4))
B, T, BLOCK = 512, 24, 8
FORMS = ("bernoulli", "count")
DRAWS = ("low_discrepancy", "stratified", "independent")
TASKS = {
    "mlm": Task("mlm", "bidirectional"),
    "diffusion": Task("diffusion", "bidirectional"),
    "block_diffusion": Task("block_diffusion", "block_diffusion"),
}


def rows(bands: Any, *, first: int = 0, visit: int = 0) -> Batch:
    """Rows of 11 to 24 tokens, a few of them special, each with its band."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((B, T)) < 0.1, 2, rng.integers(5, 64, (B, T)))
    segments = (np.arange(T) < rng.integers(11, T + 1, B)[:, None]).astype(np.int32)
    arrays = (tokens * segments, segments, np.tile(np.arange(T), (B, 1)), np.arange(B) + first, np.full(B, visit))
    whole = np.broadcast_to(np.array(bands, np.float32), (B, 2))
    return Batch(*(jnp.array(array, jnp.int32) for array in arrays), bands=jnp.array(whole))


@functools.cache
def corrupt(task: str, form: str, draw: str, schedule: str = "linear", weighting: str = "bound") -> Corrupt:
    """One executable for all bands."""
    config = ObjectiveConfig(
        name=task,
        mask_form=form,
        rate_draw=draw,
        noise_schedule=schedule,
        weighting=weighting,
        replacement="mask",
        block_length=BLOCK,
        rate_min=1e-3,
        rate_max=1.0,
    )
    return jax.jit(make_corrupt(config, TASKS[task], VOCABULARY, n_rows=B))


def hidden_in(example: Example) -> np.ndarray:
    return np.asarray(example.inputs)[:, :T] == VOCABULARY.mask_id


def nests(lighter: Example, heavier: Example) -> bool:
    return not np.any(hidden_in(lighter) & ~hidden_in(heavier))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_masks_nest_across_bands(task: str, form: str):
    own = corrupt(task, form, "low_discrepancy")
    examples = [own(jax.random.key(0), rows(band)) for band in band_edges(4, 1e-3, 1.0, "low_to_high")]
    counts = [hidden_in(example).sum() for example in examples]
    assert counts == sorted(set(counts))
    assert all(nests(examples[band], examples[band + 1]) for band in range(3))
    another_visit = own(jax.random.key(0), rows((0.75, 1.0), visit=1))
    another_row = own(jax.random.key(0), rows((0.75, 1.0), first=B))
    assert not nests(examples[2], another_visit)
    assert not nests(examples[2], another_row)


EDGES = st.floats(0.0, 1.0, width=32, allow_subnormal=False)


@settings(max_examples=20, deadline=None)
@given(EDGES, EDGES, st.sampled_from(DRAWS), st.sampled_from(["linear", "cosine", "polynomial"]))
def test_rates_lie_in_their_band(one: float, other: float, draw: str, schedule: str):
    low, high = min(one, other), max(one, other)
    example = corrupt("diffusion", "bernoulli", draw, schedule)(jax.random.key(0), rows((low, high)))
    rates = np.asarray(example.rates)
    assert np.all(rates <= np.float32(high))
    assert np.all(rates > np.float32(low)) if low < high else np.all(rates == np.float32(low))


def test_a_band_for_each_row():
    bands = np.array(band_edges(4, 1e-3, 1.0, "high_to_low"), np.float32)[np.arange(B) % 4]
    rates = np.asarray(corrupt("mlm", "count", "independent")(jax.random.key(0), rows(bands)).rates)
    assert np.all((bands[:, 0] < rates) & (rates <= bands[:, 1]))
    assert not np.all((np.roll(bands[:, 0], 1) < rates) & (rates <= np.roll(bands[:, 1], 1)))


def each_cell_once(rates: np.ndarray, low: float, high: float) -> bool:
    cells = (rates.astype(np.float64) - low) / (high - low) * len(rates)
    return np.array_equal(np.sort(np.ceil(cells)), np.arange(1, len(rates) + 1))


@pytest.mark.parametrize("first", [0, 1, 2, 1000])
def test_stratified_rates_cover_every_cell_once(first: int):
    own = corrupt("diffusion", "bernoulli", "stratified")
    rates = np.asarray(own(jax.random.key(0), rows((0.0, 1.0), first=first)).rates)
    assert each_cell_once(rates, 0.0, 1.0)
    again = np.asarray(own(jax.random.key(0), rows((0.0, 1.0), first=first, visit=1)).rates)
    assert each_cell_once(again, 0.0, 1.0)
    assert not np.array_equal(rates, again)


def test_stratified_rates_cover_every_cell_once_detects():
    for draw in ("independent", "low_discrepancy"):
        rates = np.asarray(corrupt("diffusion", "bernoulli", draw)(jax.random.key(0), rows((0.0, 1.0))).rates)
        assert not each_cell_once(rates, 0.0, 1.0)


def weights_sum_to_places(example: Example) -> bool:
    """Whether E sum(weights) / n is 1 over rows with places, to 4.5 standard errors (and rounding)."""
    n = np.asarray(example.asked if example.asked is not None else example.weights.sum(axis=1), np.float64)
    shares = np.asarray(example.weights, np.float64).sum(axis=1)[n > 0] / n[n > 0]
    return bool(abs(shares.mean() - 1.0) < 4.5 * shares.std() / math.sqrt(len(shares)) + 1e-5)


@pytest.mark.parametrize("task", ["diffusion", "block_diffusion"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("band", [(0.02, 1.0), (0.02, 0.3), (0.6, 1.0), (0.4, 0.4)])
def test_weights_sum_to_the_eligible_places(task: str, form: str, band: tuple[float, float]):
    example = corrupt(task, form, "independent")(jax.random.key(1), rows(band))
    assert weights_sum_to_places(example)
    if form == "count":  # m places of weight n/m, whatever m is
        np.testing.assert_allclose(example.weights.sum(axis=1), example.asked, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_weights_sum_to_the_eligible_places_under_every_schedule(schedule: str):
    example = corrupt("diffusion", "bernoulli", "low_discrepancy", schedule)(jax.random.key(1), rows((0.02, 1.0)))
    assert weights_sum_to_places(example)


def test_weights_sum_to_the_eligible_places_detects_uniform_ones():
    bound = corrupt("diffusion", "bernoulli", "independent")(jax.random.key(1), rows((0.02, 1.0)))
    uniform = corrupt("diffusion", "bernoulli", "independent", weighting="uniform")(
        jax.random.key(1), rows((0.02, 1.0))
    )
    assert not weights_sum_to_places(Example(**(vars(uniform) | {"asked": bound.asked})))
