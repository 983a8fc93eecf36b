"""What `make_corrupt` hands to the loss is an unbiased estimate of the bound: drawn examples against enumeration.

A table model reads thousands of examples of one row; the weighted mean must lie within its own standard error of the
exact number, for every band, form, schedule and way of drawing rates.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.objectives.bands import band_edges
from stackwise_jax.objectives.objective import Task, make_corrupt
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Example
from tests.laws.table_model import (
    ALL,
    MASK,
    ROW,
    VOCABULARY,
    T,
    copies_of_the_row,
    integral,
    integral_by_count,
    masked_losses,
    nats,
)

N_ROWS = 3 * 2**13
FLOOR = 0.02  # of rates: below, the estimate's variance grows without bound
BANDS = list(band_edges(3, FLOOR, 1.0, "high_to_low"))
DIFFUSION = Task("diffusion", "bidirectional")
BLOCKS = Task("block_diffusion", "block_diffusion")


@functools.cache
def drawn(task: Task, banded: bool = True, **fields: Any) -> Example:
    """Examples of `N_ROWS` copies of the row, the bands dealt out in turn, as numpy."""
    config = ObjectiveConfig(name=task.objective, rate_min=FLOOR, rate_max=1.0, **fields)
    corrupt = jax.jit(make_corrupt(config, task, VOCABULARY, n_rows=N_ROWS))
    example = corrupt(jax.random.key(0), copies_of_the_row(N_ROWS, BANDS if banded else None))
    return jax.tree.map(np.asarray, example)


def is_near(estimates: np.ndarray, exact: float, sigmas: float = 4.5) -> bool:
    """Whether the mean lies within its standard error, as if rates were drawn independently; even draws are nearer."""
    return bool(abs(estimates.mean() - exact) < sigmas * estimates.std() / math.sqrt(len(estimates)))


def row_losses(example: Example, *, shift: bool = False) -> np.ndarray:
    """What a loss would sum over each row: weights times -log p, in float64."""
    losses = nats(example.inputs, np.roll(example.targets, 1, axis=1) if shift else example.targets)
    losses = np.roll(losses, -1, axis=1) if shift else losses  # what is said of a place is read one before it
    return (example.weights.astype(np.float64) * losses).sum(axis=1)


def band_means_agree(example: Example, *, by_count: bool = False, eligible: np.ndarray = ALL, **options: Any) -> bool:
    """Whether the rows of every band estimate that band's mean."""
    losses, integrate = masked_losses(eligible), integral_by_count if by_count else integral
    sums = row_losses(example, **options)
    exact = [integrate(losses, low, high) / (high - low) for low, high in BANDS]
    return all(is_near(sums[band :: len(BANDS)], mean) for band, mean in enumerate(exact))


CHOICES = [
    ("bernoulli", "linear", "low_discrepancy"),
    ("bernoulli", "cosine", "independent"),
    ("bernoulli", "polynomial", "stratified"),
    ("count", "linear", "stratified"),
    ("count", "cosine", "low_discrepancy"),
]


@pytest.mark.parametrize(("form", "schedule", "draw"), CHOICES)
def test_examples_estimate_the_mean_of_their_band(form: str, schedule: str, draw: str):
    example = drawn(DIFFUSION, mask_form=form, noise_schedule=schedule, rate_draw=draw)
    assert band_means_agree(example, by_count=form == "count")
    np.testing.assert_array_equal(example.asked, T)


def test_examples_estimate_the_mean_of_the_whole_range_without_bands():
    exact = integral(masked_losses(), FLOOR, 1.0) / (1.0 - FLOOR)
    assert is_near(row_losses(drawn(DIFFUSION, banded=False)), exact)


def test_a_shifted_head_is_asked_for_the_same_bound():
    """The first place of the row has no place before it: it is given, and the bound is that of the others."""
    example = drawn(DIFFUSION, shift=True)
    assert band_means_agree(example, eligible=np.arange(T) > 0, shift=True)
    np.testing.assert_array_equal(example.asked, T - 1)
    assert not band_means_agree(example, eligible=np.arange(T) > 0)  # read where nothing was shifted
    assert not band_means_agree(example, shift=True)  # with the first place in it


@pytest.mark.parametrize("fields", [{"weighting": "uniform"}, {"max_weight": 2.0}, {"levels": "linear"}], ids=str)
def test_examples_estimate_the_mean_of_their_band_detects_other_weights(fields: dict[str, Any]):
    assert not band_means_agree(drawn(DIFFUSION, **fields))


def test_examples_estimate_the_mean_of_their_band_detects_rates_of_another_band():
    example = drawn(DIFFUSION)
    other = Example(
        **(vars(example) | {"inputs": np.roll(example.inputs, 1, 0), "weights": np.roll(example.weights, 1, 0)})
    )
    assert not band_means_agree(other)


# --- blocks ---

LENGTH = 4  # blocks of four and of two places


def block_patterns(example: Example) -> list[tuple[np.ndarray, np.ndarray]]:
    """(places, what is seen there) of each block: earlier blocks clean, its own noised, later ones hidden."""
    noised, clean = example.inputs[:, :T], example.inputs[:, T:]
    patterns = []
    for start in range(0, T, LENGTH):
        places = np.arange(start, min(start + LENGTH, T))
        shown = np.where(np.arange(T) < start, clean, np.where(np.arange(T) <= places[-1], noised, MASK))
        patterns.append((places, shown))
    return patterns


def block_losses(example: Example) -> np.ndarray:
    """Summed loss of each row, every place read in the noised half."""
    total = np.zeros(len(example.inputs))
    for places, shown in block_patterns(example):
        total += (example.weights[:, :T] * nats(shown, example.targets[:, :T]))[:, places].sum(axis=1)
    return total


def shifted_block_losses(example: Example) -> np.ndarray:
    """The same for a shifted head: one place before, but a block's first place in the clean half."""
    total = np.zeros(len(example.inputs))
    for places, shown in block_patterns(example):
        told = nats(shown, np.roll(example.targets[:, :T], 1, axis=1))
        blind = nats(np.where(np.arange(T) < places[0], shown, MASK), np.roll(example.targets[:, T:], 1, axis=1))
        for place in places[places > 0]:
            total += example.weights[:, place - 1] * told[:, place] if place > places[0] else 0.0
            total += example.weights[:, T + place - 1] * blind[:, place]
    return total


def exact_blocks(low: float, high: float, *, shift: bool) -> float:
    """The sum over blocks of each one's bound given clean blocks before it, over the width of the band."""
    total = 0.0
    for start in range(0, T, LENGTH):
        own = np.arange(start, min(start + LENGTH, T))
        losses = {}
        for mask in masked_losses((np.arange(T) >= max(start, int(shift))) & (np.arange(T) <= own[-1])):
            shown = np.where(np.isin(np.arange(T), mask) | (np.arange(T) > own[-1]), MASK, ROW)
            told = nats(shown[None], ROW[None])[0]
            if shift and start in mask:
                told[start] = nats(np.where(np.arange(T) < start, ROW, MASK)[None], ROW[None])[0, start]
            losses[mask] = float(told[list(mask)].sum())
        total += integral(losses, low, high)
    return total / (high - low)


@pytest.mark.parametrize("draw", ["low_discrepancy", "independent"])
def test_blocks_estimate_the_bound_of_each_block_given_the_ones_before(draw: str):
    example = drawn(BLOCKS, block_length=LENGTH, rate_draw=draw)
    sums = block_losses(example)
    exact = [exact_blocks(low, high, shift=False) for low, high in BANDS]
    assert all(is_near(sums[band :: len(BANDS)], mean) for band, mean in enumerate(exact))
    assert not example.weights[:, T:].any()
    np.testing.assert_array_equal(example.asked, T)
    # The same examples read as if a place saw what comes after its block.
    whole_row = (example.weights[:, :T] * nats(example.inputs[:, :T], example.targets[:, :T])).sum(axis=1)
    assert not all(is_near(whole_row[band :: len(BANDS)], mean) for band, mean in enumerate(exact))


def test_blocks_of_a_shifted_head_estimate_what_its_sampler_reads():
    example = drawn(BLOCKS, block_length=LENGTH, shift=True)
    sums = shifted_block_losses(example)
    exact = [exact_blocks(low, high, shift=True) for low, high in BANDS]
    assert all(is_near(sums[band :: len(BANDS)], mean) for band, mean in enumerate(exact))
    np.testing.assert_array_equal(np.flatnonzero(example.weights.any(axis=0)), [0, 1, 2, 4, T + LENGTH - 1])
    unshifted = [exact_blocks(low, high, shift=False) for low, high in BANDS]
    assert not all(is_near(sums[band :: len(BANDS)], mean) for band, mean in enumerate(unshifted))


def test_one_place_a_block_is_a_causal_model():
    """A place that is masked alone in its block, with probability r and weight 1/r, is asked once on average."""
    example = drawn(BLOCKS, banded=False, block_length=1)
    causal = np.diagonal(nats(np.where(np.tri(T, k=-1) > 0, ROW, MASK), np.tile(ROW, (T, 1))))
    assert is_near((example.weights[:, :T] * causal).sum(axis=1), causal.sum())
